"""The bundle's own files over HTTP: its samples and its report."""
from concurrent.futures import ThreadPoolExecutor

import tiny
from hang import Hang
from service import wait

from models.bundle import write_sums


def test_a_store_that_hangs_holds_up_only_who_asks_for_its_files(start, tmp_path):
    path = tiny.write(tmp_path / "store")
    (path / "report.html").write_text("How good it is")
    write_sums(path)
    hang = Hang(tmp_path / "hang", tmp_path / "store")
    service = start("--reload-seconds", "0", store=tmp_path / "store", env=hang.env)
    sample = (path / "samples" / "00.png").read_bytes()
    with ThreadPoolExecutor(2) as others:
        with hang.hangs():
            asked = [others.submit(service.http.get, place) for place in ("/samples/0", "/report")]
            wait(hang.reached)
            assert service.predict(tiny.image("red")).status_code == 200
            assert not any(one.done() for one in asked)
        assert [one.result().content for one in asked] == [sample, b"How good it is"]
