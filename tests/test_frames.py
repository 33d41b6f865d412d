"Films and folders of pictures: real films, a judge for rotation, kills."
import subprocess
import struct
import sys
import warnings

import cv2
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from crowdlens.core.files import InputError
from crowdlens.core.frames import (film_info, list_pictures, natural_key,
                                   read_frames, write_film, write_frames,
                                   write_picture)


def ramp(i, w=64, h=48):
    "A frame whose brightness tells its number, its left half red."
    im = np.full((h, w, 3), 5 * i % 250, np.uint8)
    im[:, : w // 2, 0] = 250
    return im


def turn(src, dst, m):
    "A copy of an mp4 with the four numbers of its display matrix set."
    raw = bytearray(src.read_bytes())
    at = raw.index(b"tkhd") + 44
    a, b, c, d = m
    raw[at:at + 36] = struct.pack(
        ">9i", *(v * 65536 for v in (a, b, 0, c, d, 0, 0, 0, 16384)))
    dst.write_bytes(raw)


@pytest.mark.parametrize("m,k", [((1, 0, 0, 1), 0), ((0, -1, 1, 0), 1),
                                 ((-1, 0, 0, -1), 2), ((0, 1, -1, 0), 3)])
def test_rotation_agrees_with_opencv(tmp_path, m, k):
    "OpenCV turns the pixels itself; ours are the same way up."
    write_film(tmp_path / "a.mp4", (ramp(i) for i in range(1, 4)), fps=10)
    turn(tmp_path / "a.mp4", tmp_path / "b.mp4", m)
    cap = cv2.VideoCapture(str(tmp_path / "b.mp4"))
    ok, judge = cap.read()
    cap.release()
    assert ok
    ours = next(iter(read_frames(tmp_path / "b.mp4")))[2]
    assert ours.shape == judge.shape
    assert film_info(tmp_path / "b.mp4").size == ours.shape[1::-1]
    assert film_info(tmp_path / "b.mp4").rotation == 90 * k
    diff = np.abs(ours.astype(int) - judge[..., ::-1].astype(int)).mean()
    assert diff < 3, diff  # another colour conversion, the same picture


@pytest.mark.parametrize("end", ["mp4", "webm"])
def test_same_bytes_each_time(tmp_path, end):
    for name in "ab":
        write_film(tmp_path / f"{name}.{end}", (ramp(i) for i in range(30)))
    a, b = ((tmp_path / f"{n}.{end}").read_bytes() for n in "ab")
    assert a == b
    assert film_info(tmp_path / f"a.{end}").codec == "vp9"


def test_variable_rate_takes_the_stamps(tmp_path):
    "Times are the stream's, not the index over the rate."
    import av
    stamps = [0, 1, 2, 10, 11, 40]
    with av.open(str(tmp_path / "v.mp4"), "w") as c:
        s = c.add_stream("libvpx-vp9", rate=10)
        s.width, s.height, s.pix_fmt = 64, 48, "yuv420p"
        for i, t in enumerate(stamps):
            f = av.VideoFrame.from_ndarray(ramp(i), format="rgb24")
            f.pts = t
            c.mux(s.encode(f))
        c.mux(s.encode())
    times = [t for _, t, _ in read_frames(tmp_path / "v.mp4")]
    np.testing.assert_allclose(times, np.array(stamps) / 10, atol=1e-3)


@settings(deadline=None, max_examples=15)
@given(w=st.integers(16, 80), h=st.integers(16, 80), n=st.integers(1, 12),
       stride=st.integers(1, 7))
def test_any_size_and_stride(tmp_path_factory, w, h, n, stride):
    p = tmp_path_factory.mktemp("f") / "a.mp4"
    assert write_film(p, (ramp(i, w, h) for i in range(n))) == n
    got = list(read_frames(p, stride=stride))
    assert [i for i, _, _ in got] == list(range(1, n + 1, stride))
    assert got[0][2].shape == (h + h % 2, w + w % 2, 3)


@given(st.lists(st.integers(0, 10 ** 6), min_size=2, max_size=9, unique=True),
       st.integers(0, 8))
def test_natural_order_is_the_numbers_order(numbers, width):
    names = [f"cam1_{k:0{width}d}.jpg" if width else f"cam1_{k}.jpg"
             for k in numbers]
    order = sorted(names, key=natural_key)
    assert order == [n for _, n in sorted(zip(numbers, names))]


def test_a_frame_that_fails_leaves_nothing(tmp_path):
    def frames():
        for i in range(40):
            if i == 30:
                raise RuntimeError("camera unplugged")
            yield ramp(i)
    with pytest.raises(RuntimeError, match="unplugged"):
        write_film(tmp_path / "a.mp4", frames())
    assert not list(tmp_path.iterdir())


def test_full_disk_leaves_nothing(tmp_path):
    "A limit on the file's size stands for the full disk."
    code = f"""
import resource, signal, sys
import numpy as np
from crowdlens.core.frames import write_film
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
rng = np.random.default_rng(0)
noise = (rng.integers(0, 255, (96, 128, 3), np.uint8) for _ in range(60))
try: write_film({str(tmp_path / "a.mp4")!r}, noise, quality=5)
except OSError as e: sys.exit(7)
"""
    r = subprocess.run([sys.executable, "-c", code], capture_output=True,
                       text=True)
    assert r.returncode == 7, r.stderr
    assert not list(tmp_path.iterdir())


def test_importing_frames_loads_no_torch():
    code = "import sys, crowdlens.core.frames; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_an_image_too_large_is_refused(tmp_path, monkeypatch):
    import crowdlens.core.frames as m
    write_frames(tmp_path, [ramp(1), ramp(2)])
    assert len(list(read_frames(tmp_path / "img1"))) == 2
    write_film(tmp_path / "a.mp4", [ramp(1)])
    monkeypatch.setattr(m, "MAX_PIXELS", 1000)
    with pytest.raises(InputError, match="too large"):
        film_info(tmp_path / "a.mp4")


def test_pictures_with_exif_come_upright(tmp_path):
    from PIL import Image
    im = Image.fromarray(ramp(1))
    exif = Image.Exif()
    exif[0x0112] = 6
    im.save(tmp_path / "a.jpg", exif=exif, quality=95)
    (_, _, got), = read_frames(tmp_path)
    assert got.shape == (64, 48, 3)
    assert got[:20, :, 0].mean() > got[-20:, :, 0].mean() + 100


def test_write_picture_png_is_lossless(tmp_path):
    im = np.random.default_rng(0).integers(0, 255, (9, 7, 3), np.uint8)
    write_picture(tmp_path / "a.png", im)
    (_, _, got), = read_frames(tmp_path)
    np.testing.assert_array_equal(got, im)


def test_damaged_film_of_the_web(shared):
    "Smeared last frames, decoder warnings: 280 frames, as OpenCV reads."
    p = shared / "realdata/videos/demo.mp4"
    film = read_frames(p)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = [(i, t, im.shape) for i, t, im in film]
    assert [i for i, _, _ in rows] == list(range(1, 281))
    assert {s for _, _, s in rows} == {(256, 340, 3)}
    t = np.array([t for _, t, _ in rows])
    assert (np.diff(t) > 0).all() and abs(t[-1] - t[0] - 279 / 28) < .2
    assert film.info.codec == "h264" and abs(film.info.fps - 28) < .1


def test_short_film_of_a_street(shared):
    p = shared / "realdata/videos/mmtracking_demo.mp4"
    info = film_info(p)
    assert (info.size, info.n) == ((1920, 1080), 8)
    rows = [i for i, _, _ in read_frames(p, stride=3, size=(320, 180))]
    assert rows == [1, 4, 7]


def test_frame_folders(shared):
    real = shared / "realdata"
    stadt = real / "mot_tud_stadtmitte/TUD-Stadtmitte"
    assert len(list_pictures(stadt / "img1")) == 179
    assert film_info(stadt / "img1").size == (640, 480)
    assert sum(1 for _ in read_frames(stadt / "vdo.avi")) == 180
    birds = [p for p in (real / "ava_bird").rglob("*")
             if p.is_dir() and any(p.glob("*.jpg"))]
    assert sorted(film_info(p).n for p in birds) == [180, 180]


def test_the_same_frame_from_film_and_folder(shared):
    "Frame k of the film is picture k of the folder (JPEG apart)."
    stadt = shared / "realdata/mot_tud_stadtmitte/TUD-Stadtmitte"
    film = {i: im for i, _, im in read_frames(stadt / "vdo.avi", stride=60)}
    pics = {i: im for i, _, im in read_frames(stadt / "img1", stride=60)}
    for i in pics:
        near = np.abs(film[i].astype(int) - pics[i]).mean()
        far = np.abs(film[i].astype(int) - pics[61 if i == 1 else 1]).mean()
        assert near < 4 < far
