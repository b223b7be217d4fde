"""The answer cache: off by default, correct when it is on, and empty when the model changes."""

from models.store import Store
from support import tiny_bundle
from support.server import wait_until


def test_the_cache_is_off_by_default(server):
    before = server.metric("imago_images_total", outcome="answered")
    for _ in range(3):
        server.predict(tiny_bundle.make_image("red", seed=99))
    assert server.metric("imago_images_total", outcome="answered") == before + 3
    assert server.metric("imago_cache_total", outcome="hit") == 0


def test_a_repeated_image_is_answered_from_the_cache(start):
    server = start("--cache-entries", "2")
    red = tiny_bundle.make_image("red")
    first = server.predict(red).json()
    second = server.predict(red).json()
    assert first["predictions"] == second["predictions"]
    assert first["id"] != second["id"]

    # Another top_k is another entry.
    top_1 = server.predict(red, "?top_k=1").json()
    assert top_1["predictions"][0]["top"] == first["predictions"][0]["top"][:1]

    # Two other images take both entries, so red is no longer there.
    for label in ("green", "blue", "red"):
        answer = server.predict(tiny_bundle.make_image(label)).json()
        assert answer["predictions"][0]["label"] == label
    assert server.metric("imago_cache_total", outcome="hit") == 1
    assert server.metric("imago_cache_total", outcome="miss") == 5
    assert server.metric("imago_images_total", outcome="answered") == 5


def test_errors_are_not_cached(start):
    server = start("--cache-entries", "100")
    assert server.predict(b"no image").status_code == 415
    assert server.predict(b"no image").status_code == 415
    assert server.metric("imago_cache_total", outcome="hit") == 0


def test_some_images_of_a_request_may_be_cached(start):
    server = start("--cache-entries", "100")
    server.predict(tiny_bundle.make_image("blue"))

    labels = ["red", "blue", "green"]
    files = [("f", ("a", tiny_bundle.make_image(label))) for label in labels]
    answer = server.http.post("/predict", files=files).json()
    assert [prediction["label"] for prediction in answer["predictions"]] == labels
    assert server.metric("imago_cache_total", outcome="hit") == 1


def test_a_new_model_empties_the_cache(start, tmp_path):
    tiny_bundle.publish(tmp_path)
    server = start("--cache-entries", "100", "--reload-seconds", "0.2", store=tmp_path)
    red = tiny_bundle.make_image("red")
    server.predict(red)
    before = server.predict(red).json()

    tiny_bundle.publish(tmp_path, scale=0.5, promote=False)
    Store(tmp_path).promote("colours", 2)
    wait_until(lambda: server.http.get("/model").json()["version"] == "2")

    after = server.predict(red).json()
    assert after["model"]["version"] == "2"
    confidence_before = before["predictions"][0]["confidence"]
    assert after["predictions"][0]["confidence"] < confidence_before - 0.05
