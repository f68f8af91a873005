"""The contact sheet shows what the json says: groups by colour, polygons and RLE alike."""

import json

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def contact_sheet(load_script):
    return load_script("tools/contact_sheet.py")


@pytest.fixture
def dataset(tmp_path):
    """Two black pictures, 40 x 30, with a box each: a rare one as polygon, a frequent one as RLE."""
    mask = np.zeros((30, 40), np.uint8)
    mask[10:20, 10:30] = 1
    rle = mask_util.encode(np.asfortranarray(mask))
    segmentations = [
        [[10.0, 10.0, 30.0, 10.0, 30.0, 20.0, 10.0, 20.0]],
        {"size": rle["size"], "counts": rle["counts"].decode()},
    ]
    content = {"images": [], "annotations": [], "categories": []}
    (tmp_path / "val").mkdir()
    for i, (segmentation, group) in enumerate(zip(segmentations, "rf"), 1):
        Image.new("RGB", (40, 30)).save(tmp_path / "val" / f"{i}.jpg")
        url = f"http://somewhere/val/{i}.jpg"
        content["images"].append({"id": i, "coco_url": url, "height": 30, "width": 40})
        content["annotations"].append(
            {"id": i, "image_id": i, "category_id": i, "bbox": [10, 10, 20, 10], "area": 200}
            | {"segmentation": segmentation}
        )
        content["categories"].append({"id": i, "name": f"thing_{i}", "frequency": group, "image_count": i})
    (tmp_path / "gt.json").write_text(json.dumps(content))
    return tmp_path


def run(contact_sheet, folder, *options) -> np.ndarray:
    files = ["--annotations", str(folder / "gt.json"), "--image-root", str(folder)]
    contact_sheet.main([*files, "--output", str(folder / "out" / "sheet.png"), *options])
    assert [path.name for path in (folder / "out").iterdir()] == ["sheet.png"]
    return np.asarray(Image.open(folder / "out" / "sheet.png").convert("RGB"))


def test_outlines_have_the_colour_of_the_group_and_the_place_of_the_mask(contact_sheet, dataset):
    sheet = run(contact_sheet, dataset, "--tile", "80", "--no-labels")
    assert sheet.shape == (80, 2 * 83 - 3, 3)
    for tile, group in ((sheet[:, :80], "r"), (sheet[:, 83:], "f")):
        rows, columns = np.nonzero((tile == contact_sheet.GROUP_COLOURS[group]).all(2))
        extent = [rows.min(), rows.max(), columns.min(), columns.max()]
        assert np.abs(np.subtract(extent, [20, 40, 20, 60])).max() <= 2  # the picture is doubled
        assert (tile[25:35, 25:55] == 0).all(), "an outline, not a filled mask"
    labelled = run(contact_sheet, dataset, "--tile", "80")
    assert (labelled != sheet).any()


def test_chosen_images_histogram_and_palette(contact_sheet, dataset):
    one = run(contact_sheet, dataset, "--image-ids", "2", "--tile", "400")
    assert one.shape == (400, 400, 3)
    with_histogram = run(contact_sheet, dataset, "--image-ids", "2", "--tile", "400", "--histogram")
    assert with_histogram.shape == (400 + 8 + 240, 400, 3)
    below = with_histogram[408:]
    for group in "rf":
        assert (below == contact_sheet.GROUP_COLOURS[group]).all(2).sum() > 100
    few = run(contact_sheet, dataset, "--image-ids", "2", "--tile", "400", "--histogram", "--palette", "16")
    assert len(np.unique(few.reshape(-1, 3), axis=0)) <= 16


def test_what_is_missing_is_named(contact_sheet, dataset):
    with pytest.raises(SystemExit, match=r"no images with ids \[7\]"):
        run(contact_sheet, dataset, "--image-ids", "7")
    (dataset / "val" / "2.jpg").unlink()
    with pytest.raises(SystemExit, match="no picture of image 2: looked for val/2.jpg"):
        run(contact_sheet, dataset)
    with pytest.raises(SystemExit, match="2"):  # argparse's exit code
        contact_sheet.main(["--annotations", "gt.json", "--output", "x.png"])
    with pytest.raises(SystemExit, match="knows no data set 'nowhere'"):
        contact_sheet.main(["--dataset", "nowhere", "--output", "x.png"])
