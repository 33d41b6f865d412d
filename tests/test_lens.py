"Cameras against hand-worked numbers, against OpenCV, and there and back."
import cv2
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from crowdlens.core.lens import (Fisheye, Pinhole, look_at, outline_box,
                                 reproject, roll, warp_boxes, warp_map,
                                 sample_edge)

ANGLE = st.floats(-3, 3)


def test_hand_worked():
    eye = look_at((0, -3, 4), (0, 0, 0))  # 3 back, 4 up: a 3-4-5 triangle
    for cam in (Pinhole(100, (50, 40), eye), Fisheye(100, (50, 40), eye)):
        uv, d = cam.project([[0, 0, 0]])
        assert np.allclose(uv, [[50, 40]]) and np.allclose(d, 5)
        # at the same distance along the axis, 5 to the right: 45 degrees
        uv, d = cam.project([[5, 0, 0]])
        r = 100 if cam.kind == 0 else 25*np.pi
        assert np.allclose(uv, [[50 + r, 40]])
        assert np.allclose(d, 5 if cam.kind == 0 else 50**.5)


def test_against_opencv():
    rng = np.random.default_rng(0)
    pose = look_at((1, -6, 3), (0, 0, .5))
    pts = rng.uniform(-2, 2, (200, 3))
    rvec = cv2.Rodrigues(pose[:, :3].copy())[0]
    K = np.array([[300., 0, 320], [0, 300, 200], [0, 0, 1]])
    want = cv2.projectPoints(pts, rvec, pose[:, 3], K, None)[0].reshape(-1, 2)
    assert np.allclose(Pinhole(300, (320, 200), pose).project(pts)[0], want)
    k = (.02, -.005, .001, -.0002)
    # OpenCV's fisheye model by its formula: its binding is not in all builds
    a = pts @ pose[:, :3].T + pose[:, 3]
    r = np.hypot(a[:, 0], a[:, 1])
    t = np.arctan2(r, a[:, 2])
    td = t*(1 + k[0]*t**2 + k[1]*t**4 + k[2]*t**6 + k[3]*t**8)
    want = a[:, :2]/r[:, None]*td[:, None]*300 + [320, 200]
    assert np.allclose(Fisheye(300, (320, 200), pose, k=k).project(pts)[0],
                       want)


@settings(max_examples=60, deadline=None)
@given(ANGLE, ANGLE, st.floats(.5, 9), st.integers(0, 1), st.integers(0, 99))
def test_there_and_back(x, y, z, kind, seed):
    pose = look_at((x, y, z), (x + 1, y + .3, 0))
    cam = (Pinhole, Fisheye)[kind](220, (320, 192), pose)
    uv = np.random.default_rng(seed).uniform((0, 0), (640, 384), (50, 2))
    rays = cam.rays(uv)
    assert np.allclose(np.linalg.norm(rays, axis=1), 1)
    back, _ = cam.project(cam.position + 5*rays)
    assert abs(back - uv).max() < 1e-6


def test_pose_is_a_rotation():
    p = look_at((2, -1, 5), (0, 0, 0))
    assert np.allclose(p[:, :3] @ p[:, :3].T, np.eye(3))
    assert np.isclose(np.linalg.det(p[:, :3]), 1)
    with pytest.raises(ValueError, match="coincide"):
        look_at((1, 1, 1), (1, 1, 1))


def test_behind_a_pinhole_is_no_picture():
    cam = Pinhole(100, (0, 0))
    uv, d = cam.project([[0, 0, -1], [0, 0, 1]])
    assert np.isnan(uv[0]).all() and d[0] == -1 and np.allclose(uv[1], 0)
    assert np.isnan(outline_box(cam, [[0, 0, -1], [1, 0, -1], [1, 1, -1]])).all()


def test_box_of_edges_holds_every_point_of_them():
    cam = Fisheye(200, (320, 320), look_at((0, 0, 7), (3, 0, 0)))
    c = np.array([[1, -4, 0], [1, 4, 0], [1, 4, 3], [1, -4, 3.]])
    box = outline_box(cam, c, 16)
    p = sample_edge(c, np.roll(c, -1, 0), 500).reshape(-1, 3)
    uv, _ = cam.project(p)
    assert np.allclose(np.r_[uv.min(0), uv.max(0)], box, atol=.15)
    corners, _ = cam.project(c)
    assert abs(np.r_[corners.min(0), corners.max(0)] - box).max() > 2


def test_circle_is_where_the_largest_angle_lands():
    cam = Fisheye(200, (0, 0), max_angle=1.5, k=(.01, 0, 0, 0))
    uv, _ = cam.project([[np.sin(1.5), 0, np.cos(1.5)]])
    assert np.isclose(uv[0, 0], cam.circle)


@settings(max_examples=40, deadline=None)
@given(st.floats(-3.1, 3.1), st.integers(0, 999))
def test_warps_go_there_and_back(angle, seed):
    rng = np.random.default_rng(seed)
    a = Fisheye(200, (160, 160), size=(320, 320))
    b = roll(Fisheye(150, (150, 170), size=(320, 320), k=(.03, -.01)), angle)
    uv = rng.uniform(40, 280, (60, 2))
    assert np.allclose(reproject(reproject(uv, a, b), b, a), uv, atol=1e-6)
    xy = rng.uniform(60, 200, (20, 2))
    boxes = np.c_[xy, xy + rng.uniform(5, 60, (20, 2))]
    assert np.allclose(warp_boxes(boxes, a, a), boxes)
    # the warped box holds every warped point of the old one
    p = boxes[:, None, :2] + rng.random((20, 30, 2))*(
        boxes[:, None, 2:] - boxes[:, None, :2])
    q, w = reproject(p, a, b), warp_boxes(boxes, a, b, 64)[:, None]
    assert ((q > w[..., :2] - .05) & (q < w[..., 2:] + .05)).all()


@pytest.mark.parametrize("seed", range(6))
def test_a_painted_box_and_its_warped_label_agree(seed):
    rng = np.random.default_rng(seed)
    src = Pinhole(rng.uniform(150, 260), (160, 120), size=(320, 240))
    dst = roll(Fisheye(rng.uniform(110, 170), (160, 120), size=(320, 240)),
               rng.uniform(-.5, .5))
    x, y = rng.integers(40, 200), rng.integers(30, 130)
    w, h = rng.integers(20, 80, 2)
    im = np.zeros((240, 320), np.float32)
    im[y:y + h, x:x + w] = 1
    new = cv2.remap(im, warp_map(src, dst), None, cv2.INTER_LINEAR)
    v, u = np.nonzero(new > .5)
    got = warp_boxes([[x, y, x + w, y + h]], src, dst)[0]
    assert abs(got - [u.min(), v.min(), u.max() + 1, v.max() + 1]).max() < 1.5
