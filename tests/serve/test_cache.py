"""The response cache: off by default, right when it is on, empty when the model changes."""

import time

from support import tiny_bundle

from models.store import Store


def test_off_by_default(server):
    before = server.metric("imago_images_total", outcome="answered")
    for _ in range(3):
        server.predict(tiny_bundle.make_image("red", seed=99))
    assert server.metric("imago_images_total", outcome="answered") == before + 3
    assert server.metric("imago_cache_total", outcome="hit") == 0


def test_the_same_image_is_answered_from_the_cache(start):
    service = start("--cache-entries", "2")
    first, second = (service.predict(tiny_bundle.make_image("red")).json() for _ in range(2))
    assert first["predictions"] == second["predictions"]
    assert first["id"] != second["id"]
    assert (
        service.predict(tiny_bundle.make_image("red"), "?top_k=1").json()["predictions"][0]["top"]
        == first["predictions"][0]["top"][:1]
    )
    for label in ("green", "blue", "red"):  # two others, so the first is gone
        assert (
            service.predict(tiny_bundle.make_image(label)).json()["predictions"][0]["label"]
            == label
        )
    assert service.metric("imago_cache_total", outcome="hit") == 1
    assert service.metric("imago_cache_total", outcome="miss") == 5
    assert service.metric("imago_images_total", outcome="answered") == 5


def test_errors_are_not_kept_and_many_images_may_hit_in_part(start):
    service = start("--cache-entries", "100")
    assert [service.predict(b"no image").status_code for _ in range(2)] == [415, 415]
    service.predict(tiny_bundle.make_image("blue"))
    files = [("f", ("a", tiny_bundle.make_image(label))) for label in ("red", "blue", "green")]
    answer = service.http.post("/predict", files=files).json()
    assert [p["label"] for p in answer["predictions"]] == ["red", "blue", "green"]
    assert service.metric("imago_cache_total", outcome="hit") == 1


def test_a_new_model_empties_it(start, tmp_path):
    tiny_bundle.publish(tmp_path)
    service = start("--cache-entries", "100", "--reload-seconds", "0.2", store=tmp_path)
    data = tiny_bundle.make_image("red")
    before = [service.predict(data).json() for _ in range(2)]
    tiny_bundle.publish(tmp_path, scale=0.5, promote=False)
    Store(tmp_path).promote("colours", 2)
    end = time.monotonic() + 30
    while service.http.get("/model").json()["version"] != "2":
        assert time.monotonic() < end
        time.sleep(0.05)
    after = service.predict(data).json()
    assert after["model"]["version"] == "2"
    assert after["predictions"][0]["confidence"] < before[1]["predictions"][0]["confidence"] - 0.05
