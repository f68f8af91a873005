"""Reading results files, checking them, and the command line tools."""

import copy
import gzip
import json
import re
import sys
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from test_evaluator_in_loop import make_dataset, make_outputs
from test_metrics_oracle import random_problem

from lt_det.evaluation import GroundTruth, InvalidResultsError, evaluate_results, ground_truth, results_io
from lt_det.evaluation.result_collector import MaskSpool
from lt_det.evaluation.results_io import read_results, results_from_dicts
from lt_det.evaluation.rle import RleTable
from lt_det.io import json_kernels as kernels
from lt_det.io.json_blocks import iter_json_blocks, iter_json_list


@pytest.fixture(scope="module")
def problem():
    return random_problem(4, 4, 4, 20, True, True, True, True, False)


# ------------------------------------------------------------------ parsing

# As values, or as texts that json.dumps would not write.
NUMBERS = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(0, 1),
    st.floats(0, 1, width=32),
    st.integers(-(10**20), 10**20),
    st.decimals(0, 1, places=17).map(str),
)


@settings(max_examples=500)
@given(NUMBERS)
def test_numbers_are_parsed_as_python_does(value):
    text = value if isinstance(value, str) else json.dumps(value)
    (part,) = results_io._read_block(f'[{{"image_id": 1, "category_id": 2, "score": {text}}}]'.encode())
    assert part.score[0] == float(text) and part.fields[0] == 7


@njit
def number_of(text):
    return kernels.parse_number(kernels.first_byte(text), 0)


def parse_number(text):
    return number_of(np.frombuffer(text.encode() + bytes(kernels.PADDING), np.uint8))


@settings(max_examples=500)
@given(NUMBERS)
def test_the_compiled_parser_of_numbers_parses_them_so_too(value):
    text = value if isinstance(value, str) else json.dumps(value)
    number, place, kind = parse_number(text)
    assert place == len(text) and kind in (0, 1, 2)
    if kind != 2:  # else Python reads it
        assert number == float(text) and (kind == 0) == isinstance(json.loads(text), int)


@pytest.mark.parametrize("text", ["", "-", ".5", "1.", "1.e3", "01", "1e", "1e+", "--1", "NaN", "+1", "1.5.2"])
def test_what_is_no_json_number_to_the_compiled_parser(text):
    _, place, kind = parse_number(text)
    assert kind == 3 or place < len(text)


def test_usual_numbers_take_the_fast_path():
    scores = np.random.default_rng(0).random(2000).astype(np.float32).tolist()
    slow = 0
    for s in scores:
        number, _, kind = parse_number(repr(s))
        slow += kind == 2
        assert kind == 2 or number == s
    assert slow < 20


@pytest.mark.parametrize("text", ["", "-", ".5", "1.", "1.e3", "01", "1e", "1e+", "--1", "+1", "1.5.2"])
def test_what_is_no_json_number(text):
    with pytest.raises(ValueError):
        results_io._read_block(f'[{{"image_id": 1, "category_id": 2, "score": {text}}}]'.encode())


@pytest.mark.parametrize(
    "change",
    [
        {"image_id": 5.0}, {"image_id": 5.7}, {"image_id": True}, {"category_id": 2**63}, {"category_id": -(2**70)},
        {"score": None}, {"score": "0.5"}, {"score": 10**400}, {"score": float("nan")}, {"bbox": None},
        {"bbox": [1, 2]}, {"segmentation": None}, {"segmentation": {}},
        {"segmentation": {"size": [3, 4], "counts": "é"}},
        {"segmentation": {"size": [2**31, 4], "counts": "1"}}, {"segmentation": {"size": [2**63, 4], "counts": "1"}},
        {"segmentation": {"size": [3.0, 4], "counts": "1"}}, {"segmentation": {"size": [3, 4], "counts": ""}},
        {"segmentation": [[1, 2, 3, 4, 5, 6]]}, {"segmentation": 7},
    ],
    ids=repr,
)  # fmt: skip
def test_the_usual_and_the_unusual_way_agree(change):
    """A block without anything unusual goes another way than one with it: both read it alike."""
    usual = {"image_id": 3, "category_id": 4, "score": 0.25, "bbox": [1, 2, 3, 4.5]}
    usual["segmentation"] = {"size": [3, 4], "counts": "0<"}
    block = json.dumps([usual, {**usual, **change}, usual]).encode()
    (part,) = results_io._read_block(block)
    expected = results_from_dicts(json.loads(block))
    for name in ("image_id", "category_id", "score", "boxes", "fields"):
        np.testing.assert_array_equal(getattr(part, name), getattr(expected, name), err_msg=name)
    assert part.masks.strings() == expected.masks.strings() and part.shapes == expected.shapes
    np.testing.assert_array_equal(part.masks.size, expected.masks.size)


def collect(parts):
    """Columns of all parts, with owned mask strings."""
    parts = list(parts)
    rows = {
        n: np.concatenate([getattr(p, n) for p in parts])
        for n in ("image_id", "category_id", "score", "boxes", "fields")
    }
    rows["masks"] = [s for p in parts for s in p.masks.strings()]
    return rows


@pytest.mark.parametrize("chunk", [1 << 16, 300, 7])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("unusual", [False, True])
def test_stream_equals_json_module_whatever_the_block(tmp_path, problem, chunk, indent, unusual, monkeypatch):
    results = copy.deepcopy(problem[1])
    for r in results[::3]:  # text with what looks like the next result
        r["note"] = '}, {"image_id": 3, "category_id": 1, "score": 1}, {' * 2
    if unusual:
        results[3]["note"] = {"nested": ["]", '"}', "\\"], "number": -1.5e-3}
        results[3]["score"] = float("inf")  # no json, but what Python writes and reads
    results[4]["score"], results[4]["bbox"][2] = 1.2345678901234567e-30, 12345678901234567890
    results[5]["segmentation"] = {
        "counts": results[5]["segmentation"]["counts"],
        "size": results[5]["segmentation"]["size"],
    }
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results, indent=indent))
    taken = []
    monkeypatch.setattr(results_io, "iter_json_list", partial(iter_json_list, block_bytes=chunk))
    monkeypatch.setattr(results_io, "results_from_dicts", lambda r: taken.append(r) or results_from_dicts(r))
    ours = collect(read_results(path, progress=False))
    assert bool(taken) == unusual
    np.testing.assert_array_equal(ours["image_id"], [r["image_id"] for r in results])
    np.testing.assert_array_equal(ours["category_id"], [r["category_id"] for r in results])
    np.testing.assert_array_equal(ours["score"], [r["score"] for r in results])
    np.testing.assert_array_equal(ours["boxes"], [r["bbox"] for r in results])
    assert ours["masks"] == [r["segmentation"]["counts"].encode() for r in results]
    assert (ours["fields"] == 31).all()


@pytest.mark.parametrize("chunk", [1 << 16, 64])
def test_annotations_stream_in_any_order_of_members(tmp_path, problem, chunk, monkeypatch):
    monkeypatch.setattr(ground_truth, "iter_json_blocks", partial(iter_json_blocks, block_bytes=chunk))
    content = problem[0]
    expected = GroundTruth.from_dict(content)
    for order in (
        ["annotations", "images", "categories"],
        ["categories", "annotations", "images"],
        list(content),
    ):
        path = tmp_path / "gt.json"
        path.write_text(json.dumps({"info": {"a": [1, {"b": "}"}]}, **{k: content[k] for k in order}}))
        ours = GroundTruth.from_json(path)
        np.testing.assert_array_equal(ours.boxes, expected.boxes)
        np.testing.assert_array_equal(ours.cell_category, expected.cell_category)
        assert ours.masks.strings() == expected.masks.strings()


def test_annotations_that_the_fast_parser_leaves_keep_their_order(tmp_path, problem):
    """Of equal annotations the later one is matched, so the order must survive; here one of two is unusual
    json."""
    head = {k: problem[0][k] for k in ("images", "categories")}
    image, category = head["images"][0]["id"], head["categories"][0]["id"]
    same = {"image_id": image, "category_id": category, "bbox": [1.0, 1.0, 5.0, 5.0], "iscrowd": 0}
    annotations = [dict(same, id=i + 1, area=10.0 + i) for i in range(4)]
    text = json.dumps(dict(head, annotations=annotations)).replace(
        '"area": 11.0', '"area": 11.0000000000000000000000000'
    )
    (tmp_path / "gt.json").write_text(text.replace('"iscrowd": 0}]', '"iscrowd": false}]'))
    gt = GroundTruth.from_json(tmp_path / "gt.json", with_masks=False)
    np.testing.assert_array_equal(gt.areas, [10, 11, 12, 13])


def test_gzip_and_plain_files_and_lists_agree(tmp_path, problem):
    content, results = problem
    gt = GroundTruth.from_dict(content)
    text = json.dumps(results)
    (tmp_path / "r.json").write_text(text)
    with gzip.open(tmp_path / "r.json.gz", "wt") as f:
        f.write(text)
    expected = evaluate_results(gt, results).metrics
    for name in ("r.json", "r.json.gz"):
        ours = evaluate_results(gt, tmp_path / name).metrics
        for task in ("bbox", "segm"):
            np.testing.assert_equal(dict(ours[task]), dict(expected[task]))


def test_detectron2_predictions_file(tmp_path):
    """instances_predictions.pth holds class indices; LVISEvaluator writes it before it maps them."""
    from detectron2.evaluation.coco_evaluation import instances_to_coco_json

    rng = np.random.default_rng(3)
    content = make_dataset(rng, first_id=4)
    inputs, outputs = make_outputs(rng, content, first_id=4)
    predictions = [
        {"image_id": i["image_id"], "instances": instances_to_coco_json(o["instances"], i["image_id"])}
        for i, o in zip(inputs, outputs)
    ]
    torch.save(predictions, tmp_path / "instances_predictions.pth")
    results = [dict(r, category_id=r["category_id"] + 4) for p in predictions for r in p["instances"]]
    gt = GroundTruth.from_dict(content)
    ours, expected = (evaluate_results(gt, r).metrics for r in (tmp_path / "instances_predictions.pth", results))
    assert list(ours) == ["bbox", "segm"] and ours["segm"]["AP"] > 0
    for task in ours:
        np.testing.assert_equal(dict(ours[task]), dict(expected[task]))


def test_uncompressed_and_polygon_results(problem):
    content, _ = problem
    annotation = next(a for a in content["annotations"] if isinstance(a["segmentation"], list))
    image = next(i for i in content["images"] if i["id"] == annotation["image_id"])
    head = {"image_id": image["id"], "category_id": annotation["category_id"], "score": 0.5}
    polygon = annotation["segmentation"]
    from lt_det.evaluation.rle import encode_segmentations

    table, _ = encode_segmentations([polygon], np.array([[image["height"], image["width"]]]))
    counts, _ = table.counts()
    size = [image["height"], image["width"]]
    forms = [
        polygon,
        {"size": size, "counts": counts.tolist()},
        {"size": size, "counts": table.strings()[0].decode()},
    ]
    gt = GroundTruth.from_dict(content)
    metrics = [evaluate_results(gt, [dict(head, segmentation=f)]).metrics["segm"] for f in forms]
    for other in metrics[1:]:
        np.testing.assert_equal(dict(other), dict(metrics[0]))


def test_masks_spill_to_disk(problem):
    strings = [b"abc", b"", b"defgh"] * 5
    spool = MaskSpool(limit=10)
    rows = np.concatenate([spool.add(RleTable.from_strings(strings, np.zeros((15, 2)))) for _ in range(3)])
    table = spool.finish()
    assert spool._file is not None
    np.testing.assert_array_equal(rows, np.arange(45))
    assert table.strings() == strings * 3


# ------------------------------------------------------------------ checks


def breakages():
    def edit(**changes):
        def change(r):
            r.update(changes)

        return change

    def drop(key):
        return lambda r: r.pop(key)

    def mask(**changes):
        def change(r):
            r["segmentation"] = dict(r["segmentation"], **changes)

        return change

    return {
        "unknown image_id": edit(image_id=123456789),
        "unknown category_id": edit(category_id=99999),
        "no image_id": drop("image_id"),
        "no category_id": drop("category_id"),
        "no score": drop("score"),
        "score is not finite": edit(score=float("nan")),
        "bbox is not finite": edit(bbox=[0.0, float("inf"), 1.0, 1.0]),
        "no bbox": edit(bbox=[1.0, 2.0, 3.0]),
        "no segmentation": drop("segmentation"),
        "mask size is not the image's": mask(size=[3, 1000]),
    }


@pytest.mark.parametrize("kind", breakages())
@pytest.mark.parametrize("as_file", [False, True])
def test_invalid_results_are_named_counted_and_skipped(problem, tmp_path, kind, as_file):
    content, results = problem
    gt = GroundTruth.from_dict(content)
    broken = [dict(r) for r in results]
    for i in (2, 7):
        breakages()[kind](broken[i])
    if as_file:
        (tmp_path / "r.json").write_text(json.dumps(broken))
        broken = tmp_path / "r.json"
    with pytest.raises(InvalidResultsError, match=f"2 of {len(results)} results .*\n  2 x {kind}") as error:
        evaluate_results(gt, broken)
    assert error.value.problems == {kind: 2}
    ours = evaluate_results(gt, broken, skip_invalid=True)
    assert ours.problems == {kind: 2} and ours.num_results == len(results)
    expected = evaluate_results(gt, [r for i, r in enumerate(results) if i not in (2, 7)]).metrics
    for task in expected:
        np.testing.assert_equal(dict(ours.metrics[task]), dict(expected[task]))


def test_masks_that_do_not_cover_the_image(problem):
    content, results = problem
    gt = GroundTruth.from_dict(content)
    image = content["images"][0]
    category = image["neg_category_ids"][0] if image["neg_category_ids"] else content["annotations"][0]["category_id"]
    counts = RleTable.from_counts(np.array([1, 2], np.uint32), np.array([0, 2]), np.zeros((1, 2))).strings()[0].decode()
    bad = {"size": [image["height"], image["width"]], "counts": counts}
    assert image["height"] * image["width"] != 3
    result = {"image_id": image["id"], "category_id": category, "score": 0.5, "segmentation": bad}
    with pytest.raises(InvalidResultsError, match="1 x run lengths do not cover the image"):
        evaluate_results(gt, [result])
    assert evaluate_results(gt, [result], skip_invalid=True).metrics["segm"]["AP"] == 0


def test_zero_based_categories_are_recognised():
    content, results = random_problem(4, 4, 4, 20, False, True, True, True, False)
    new = {c["id"]: i + 1 for i, c in enumerate(sorted(content["categories"], key=lambda c: c["id"]))}
    for c in content["categories"]:
        c["id"] = new[c["id"]]
    for a in content["annotations"]:
        a["category_id"] = new[a["category_id"]]
    for i in content["images"]:
        for key in ("neg_category_ids", "not_exhaustive_category_ids"):
            i[key] = [new[c] for c in i[key]]
    zero_based = [dict(r, category_id=new[r["category_id"]] - 1) for r in results]
    with pytest.raises(InvalidResultsError, match="look zero-based"):
        evaluate_results(GroundTruth.from_dict(content), zero_based)


def test_files_that_are_no_results(tmp_path, problem):
    content, results = problem
    gt = GroundTruth.from_dict(content)
    path = tmp_path / "r.json"
    for text, message in (
        (json.dumps(content), "an object \\(an annotation file"),
        ("", "holds nothing"),
        (json.dumps(results)[:-40], "cut off"),
        ('[{"image_id": 1 "score": 2}]', "not a complete"),
        ('[{"image_id": 1} {"image_id": 2}]', "not a complete"),
        ('[{"image_id": 1}, {"image_id": }]', "not a complete"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            list(read_results(path, progress=False))
    with pytest.raises(FileNotFoundError, match="no results file"):
        evaluate_results(gt, tmp_path / "missing.json")
    torch.save({"model": 1}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match="not an instances_predictions.pth"):
        evaluate_results(gt, tmp_path / "model.pth")
    torch.save([print], tmp_path / "code.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "model.pth").read_bytes()[:200])
    (tmp_path / "empty.pth").write_bytes(b"")
    for name in ("code.pth", "cut.pth", "empty.pth"):
        with pytest.raises(ValueError, match=f"{name} cannot be read") as raised:
            evaluate_results(gt, tmp_path / name)
        assert "\n" not in str(raised.value) and "weights_only" not in str(raised.value)
    path.write_text("[]")
    assert evaluate_results(gt, path).metrics["bbox"]["AP"] == 0


def test_ground_truth_errors(tmp_path, problem):
    content, _ = problem
    path = tmp_path / "gt.json"
    path.write_text("[1, 2]")
    with pytest.raises(ValueError, match="not an annotation json"):
        GroundTruth.from_json(path)
    path.write_text(json.dumps(content)[:-50])
    with pytest.raises(ValueError, match="cut off|ends before"):
        GroundTruth.from_json(path)
    with pytest.raises(FileNotFoundError, match="no annotation file"):
        GroundTruth.from_json(tmp_path / "missing.json")
    with pytest.raises(ValueError, match="'categories' is missing"):
        GroundTruth.from_dict({"images": content["images"]})
    twice = dict(content, annotations=content["annotations"] * 2)
    with pytest.raises(ValueError, match="occur more than once"):
        GroundTruth.from_dict(twice)
    without = dict(content, annotations=[{k: v for k, v in content["annotations"][0].items() if k != "area"}])
    with pytest.raises(ValueError, match="annotations' of id 1 is wrong: .*`area`"):
        GroundTruth.from_dict(without)
    with pytest.raises(ValueError, match="not_exhaustive_category_ids"):
        images = [{k: v for k, v in i.items() if k != "not_exhaustive_category_ids"} for i in content["images"]]
        GroundTruth.from_dict(dict(content, images=images))
    with pytest.raises(ValueError, match="not class indices"):
        GroundTruth.from_dict(content, frequency_groups={"r": [100000]})


def test_frequency_groups_from_counts_and_from_the_caller(problem):
    content = dict(problem[0], categories=[dict(c) for c in problem[0]["categories"]])
    for c, n in zip(content["categories"], (10, 11, 100, 101)):
        del c["frequency"]
        c["image_count"] = n
    gt = GroundTruth.from_dict(content)
    by_id = dict(zip(gt.category_ids.tolist(), gt.group.tolist()))
    assert [by_id[c["id"]] for c in content["categories"]] == [0, 1, 1, 2]
    ids = [c["id"] for c in content["categories"]]
    gt = GroundTruth.from_dict(content, frequency_groups={"f": ids[:1], "r": ids[1:3]})
    by_id = dict(zip(gt.category_ids.tolist(), gt.group.tolist()))
    assert [by_id[i] for i in ids] == [2, 0, 0, -1]


def test_counts_of_the_file_itself_are_not_taken_for_the_training_sets():
    """As in subsets of LVIS whose categories were counted anew."""
    content = {
        "images": [{"id": i, "width": 9, "height": 9} for i in (1, 2, 3)],
        "annotations": [
            {"id": 10 * i + c, "image_id": i, "category_id": c, "bbox": [0, 0, 3, 3], "area": 9}
            for i, c in ((1, 1), (2, 1), (3, 2))
        ],
        "categories": [{"id": c, "name": f"c{c}", "image_count": n} for c, n in ((1, 2), (2, 1), (3, 0))],
    }
    assert GroundTruth.from_dict(content, with_masks=False).image_count.tolist() == [-1, -1, -1]
    content["categories"][2]["image_count"] = 5
    assert GroundTruth.from_dict(content, with_masks=False).image_count.tolist() == [2, 1, 5]


# ------------------------------------------------------------------ command line


def test_evaluate_lvis_tool(tmp_path, problem, load_script, capsys):
    content, results = problem
    (tmp_path / "gt.json").write_text(json.dumps(content))
    (tmp_path / "r.json").write_text(json.dumps(results))
    tool = load_script("tools/evaluate_lvis.py")
    common = ["--annotations", str(tmp_path / "gt.json"), "--no-progress"]
    out = tmp_path / "out"
    arguments = ["--results", str(tmp_path / "r.json"), "--output-dir", str(out), "--ap-fixed"]
    assert (
        tool.main(
            common + arguments + ["--iou-types", "bbox", "segm", "boundary", "--tensorboard", str(tmp_path / "tb")]
        )
        == 0
    )
    written = json.loads((out / "metrics.json").read_text())
    expected = evaluate_results(GroundTruth.from_dict(content), results, ap_fixed=True).metrics
    for task in ("bbox", "segm"):
        clean = {k: None if np.isnan(v) else v for k, v in expected[task].items()}
        assert written[task] == clean
    assert "boundary" in written
    rows = (out / "per_category.csv").read_text().splitlines()
    assert rows[0].startswith(
        "category_id,name,group,image_count,instance_count,annotations,bbox_AP,bbox_AP50,bbox_AR,bbox_AP-fixed"
    )
    assert len(rows) == 1 + len(content["categories"])
    names = {p.name for p in out.iterdir()}
    assert {
        "groups.png",
        "ap_by_count_segm.png",
        "precision_recall_bbox.png",
        "matches_boundary.npz",
    } <= names
    assert not [n for n in names if n.startswith(".")]
    assert "AP-fixed" in capsys.readouterr().out
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    scalars = EventAccumulator(str(tmp_path / "tb"))
    scalars.Reload()
    assert scalars.Scalars("segm/AP")[0].value == pytest.approx(written["segm"]["AP"], abs=1e-4)

    (tmp_path / "bad.json").write_text(json.dumps([dict(results[0], image_id=-5)] + results[1:]))
    arguments[1] = str(tmp_path / "bad.json")
    assert tool.main(common + arguments) == 2
    assert "unknown image_id" in capsys.readouterr().err
    assert tool.main(common + arguments + ["--skip-invalid", "--no-plots"]) == 0


def test_mmdetection_pair_of_files(tmp_path, problem, load_script):
    """mmdetection writes boxes and masks to two files of the same format."""
    content, results = problem
    (tmp_path / "gt.json").write_text(json.dumps(content))
    boxes = [{k: v for k, v in r.items() if k != "segmentation"} for r in results]
    masks = [{k: v for k, v in r.items() if k != "bbox"} for r in results]
    for name, part in (("m.bbox.json", boxes), ("m.segm.json", masks)):
        (tmp_path / name).write_text(json.dumps(part))
    tool = load_script("tools/evaluate_lvis.py")
    files = [str(tmp_path / n) for n in ("m.bbox.json", "m.segm.json")]
    out = str(tmp_path / "out")
    assert (
        tool.main(
            [
                "--annotations",
                str(tmp_path / "gt.json"),
                "--results",
                *files,
                "--output-dir",
                out,
                "--no-plots",
                "--no-progress",
            ]
        )
        == 0
    )
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    gt = GroundTruth.from_dict(content)
    assert written["bbox"]["AP"] == evaluate_results(gt, boxes).metrics["bbox"]["AP"]
    assert written["segm"]["AP"] == evaluate_results(gt, masks).metrics["segm"]["AP"]


def test_compare_lvis_tool(tmp_path, problem, load_script, capsys):
    content, results = problem
    (tmp_path / "gt.json").write_text(json.dumps(content))
    worse = [dict(r, score=1 - r["score"]) for r in results]
    gt = GroundTruth.from_dict(content)
    evaluate_results(gt, results).save(str(tmp_path / "a"), plots=False)
    (tmp_path / "b.json").write_text(json.dumps(worse))
    tool = load_script("tools/compare_lvis.py")
    code = tool.main(
        [str(tmp_path / "a"), str(tmp_path / "b.json"), "--annotations", str(tmp_path / "gt.json"),
         "--replicates", "50",
         "--no-progress", "--output-dir", str(tmp_path / "c")]
    )  # fmt: skip
    assert code == 0 and "50 paired draws of 4 images" in capsys.readouterr().out
    written = json.loads((tmp_path / "c" / "comparison.json").read_text())
    assert written["bbox"]["AP"]["a"] == pytest.approx(evaluate_results(gt, results).metrics["bbox"]["AP"])
    assert written["segm"]["AP"]["b"] == pytest.approx(evaluate_results(gt, worse).metrics["segm"]["AP"])
    assert (tmp_path / "c" / "comparison_segm.csv").exists()
    # A run's own folder, whose evaluation is below.
    (tmp_path / "run").mkdir()
    (tmp_path / "a").rename(tmp_path / "run/inference")
    ours = ["--annotations", str(tmp_path / "gt.json"), "--replicates", "5"]
    assert tool.main([str(tmp_path / "run"), str(tmp_path / "b.json"), *ours]) == 0
    assert f"A: {tmp_path / 'run'}\n" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert tool.main([str(tmp_path / "run"), str(tmp_path / "empty"), *ours]) == 2
    assert re.search("lt-det compare: .*empty holds no matches", capsys.readouterr().err)


def test_import_is_light():
    """The metrics work without torch, Detectron2 and the lvis package."""
    import subprocess

    code = (
        "import sys; from lt_det.evaluation import evaluate_results, GroundTruth; "
        "heavy = {'torch', 'detectron2', 'lvis', 'cv2', 'numba', 'matplotlib'} & set(sys.modules); assert "
        "not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "text",
    [
        '{"image_id": 1, "category_id": 2, "score": 0.5, "score": 0.25}',  # json has the last
        '{"image_id": 1, "category_id": 2, "score": 1e-40, "bbox": [1e-300, 1e300, 1, 0.1e1]}',
        '{"image_id": 1, "category_id": 2, "score": 0.5, "id": null, "area": 3e400, "x": {"score": [1, "}"]}}',
        '{ "image_id" : -0 ,\t"category_id":2,"score":-0.0,"bbox":[ 1 , 2 , 3 , 4 ] }',
        '{"\\u0073core": 0.5, "image_id": 1, "category_id": 2}',
        '{"image_id": 1}',
        "{}",
        '{"image_id":1,"category_id":2,"score":0.5,"segmentation":{"counts":"4\\\\4","size":[3,4],"size":[4,3]}}',
        '{"image_id":1,"category_id":2,"score":0.5,"segmentation":{"counts":"4\\\\4","size":[3,4]}}',
    ],
)
def test_results_of_every_writing_are_read_as_the_json_module_reads_them(text):
    usual = '{"image_id": 7, "category_id": 2, "score": 0.125}'
    block = f"[{usual}, {text}, {usual}]".encode()
    (part,) = results_io._read_block(block)
    expected = results_from_dicts(json.loads(block))
    for name in ("image_id", "category_id", "score", "boxes", "fields"):
        np.testing.assert_array_equal(getattr(part, name), getattr(expected, name), err_msg=name)
    assert part.masks.strings() == expected.masks.strings()


@pytest.mark.parametrize("text", ["[", "[{}", "[{},]", "[{} {}]", '[{"score": 1]', "[{}]]", '[{"a": [}]', "[1, {}, x]"])
def test_damaged_results_are_an_error(text):
    with pytest.raises(ValueError):
        results_io._read_block(text.encode())
