"""The audit on data sets of other people: no crash, and the counts that
their descriptions state."""
import shutil

import pytest

from crowdlens import audit as stage
from crowdlens.core.files import InputError

SETS = {  # folder or yaml: figures stated by its description
    "fisheye8k": dict(images=4, boxes=114, rows=114),
    "person_head_coco": dict(images=6, boxes=96, **{"boxes/person": 50,
                                                   "boxes/head": 46}),
    "voc_formats": dict(images=30, boxes=99, label_files=30),
    "yolo_coco8/coco8": dict(images=8, boxes=30, polygons=0),
    "yolo_coco8/coco8-seg/coco8-seg.yaml": dict(images=8, boxes=30,
                                                polygons=30),
    "yolo_messy_apd": dict(images=33, label_files=9, rows=72, **{
        "flaws/missing_label": 24, "flaws/class_out_of_range": 12,
        "flaws/names_count": 1, "flaws/bad_path": 2}),
    "yolo_messy_gaps": dict(images=15, label_files=7, rows=18, **{
        "flaws/missing_label": 8, "flaws/empty_label": 1,
        "flaws/bad_path": 2})}


@pytest.mark.parametrize("name", SETS)
def test_stated_counts(shared, tmp_path, name):
    r = stage.run(stage.Config(root=str(shared/"realdata"/name), pictures=4,
                               out=str(tmp_path), clean=True))
    assert {k: r[k] for k in SETS[name]} == SETS[name]
    damage = [k for k in r.metrics if k in ("flaws/truncated_image",
              "flaws/corrupt_jpeg", "flaws/unreadable_image")]
    assert not damage
    assert (r.folder/"report.html").stat().st_size > 50_000


def test_rows_that_real_labels_repeat(shared, tmp_path):
    "Four of the label files without images repeat a row."
    src = shared/"realdata/fisheye8k"
    (tmp_path/"images").mkdir()
    shutil.copytree(src/"labels_only", tmp_path/"labels")
    shutil.copy(src/"data.yaml", tmp_path)
    pic = next((src/"images").iterdir())
    for p in (tmp_path/"labels").iterdir():
        shutil.copy(pic, tmp_path/"images"/f"{p.stem}{pic.suffix}")
    a = stage.audit(tmp_path, pixels=False)
    t = a.flaws.to_pylist()
    assert len({f["file"] for f in t if f["flaw"] == "duplicate_row"}) == 4


def test_damaged_and_turned_images(shared, tmp_path):
    src = shared/"realdata/broken_images"
    shutil.copytree(src, tmp_path/"images")
    (tmp_path/"classes.txt").write_text("thing\n")
    a = stage.audit(tmp_path)
    bad = {}
    for f in a.flaws.to_pylist():
        bad.setdefault(f["flaw"], set()).add(f["file"].split("/")[-1])
    assert bad["exif_rotated"] == {
        "Landscape_3.jpg", "Landscape_6.jpg", "hopper_orientation_3.jpg",
        "hopper_orientation_6.jpg", "hopper_orientation_8.jpg"}
    broken = bad.get("unreadable_image", set()) | bad["truncated_image"]
    assert broken == {"broken.png", "truncated_image.png"}
    # odd bytes between the segments: a strict decoder stops, others do not
    assert bad["corrupt_jpeg"] == {"hopper_bad_exif.jpg", "truncated_app14.jpg"}
    assert "pil_sample_cmyk.jpg" not in broken | bad["corrupt_jpeg"]
    a.sheets(16)


def test_images_without_labels(shared, tmp_path):
    src = shared/"realdata/crowdhuman_images"
    with pytest.raises(InputError, match="classes.txt"): stage.audit(src)
    shutil.copytree(src/"images", tmp_path/"images")
    (tmp_path/"classes.txt").write_text("person\nhead\n")
    a = stage.audit(tmp_path)
    assert a.counts() == {"missing_label": 2, "unused_name": 2}


def test_neighbouring_film_frames_are_the_same_picture(shared, tmp_path):
    "A film cut into splits at random leaks; splits by sequence do not."
    frames = sorted((shared/"realdata/mot_tud_stadtmitte").rglob("*.jpg"))[:60]
    for i, p in enumerate(frames):
        to = tmp_path/("train" if i % 3 else "val")/"images"/f"tud_{i:04d}.jpg"
        to.parent.mkdir(parents=True, exist_ok=True); shutil.copy(p, to)
    (tmp_path/"data.yaml").write_text(
        "train: train/images\nval: val/images\nnames: [person]\n")
    leak = stage.audit(tmp_path).counts()["near_duplicate_across_splits"]
    assert leak >= 15  # of 20
    with pytest.raises(InputError, match="groups cannot fill"):
        stage.split(tmp_path, tmp_path/"lists", dict(train=.5, val=.5),
                    pattern=r"(tud)_")
