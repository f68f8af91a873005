"""LongTailLVISEvaluator inside Detectron2's loop, against Detectron2's own evaluators."""

import json
import logging
import warnings
from dataclasses import replace

import numpy as np
import pycocotools.mask as mask_utils
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, LVISEvaluator
from detectron2.structures import BitMasks, Boxes, Instances, ROIMasks
from evaluation_oracles import numpy_float

from lt_det.evaluation import LongTailLVISEvaluator


def make_dataset(rng, num_images=12, num_categories=6, federated=True, first_id=1):
    """A json of boxes with elliptic polygons."""
    images, annotations = [], []
    for i in range(num_images):
        h, w = int(rng.integers(60, 140)), int(rng.integers(60, 140))
        image = {"id": 100 - i, "height": h, "width": w, "file_name": f"{i}.jpg"}
        present = rng.choice(num_categories, int(rng.integers(0, 4)), replace=False) + first_id
        for c in present:
            for _ in range(int(rng.integers(1, 4))):
                x, y = rng.uniform(0, w - 20), rng.uniform(0, h - 20)
                bw, bh = rng.uniform(4, w - x), rng.uniform(4, h - y)
                t = np.linspace(0, 2 * np.pi, 17)[:-1]
                polygon = np.stack([x + bw / 2 * (1 + np.cos(t)), y + bh / 2 * (1 + np.sin(t))], 1).ravel()
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image["id"],
                        "category_id": int(c),
                        "bbox": [x, y, bw, bh],
                        "area": bw * bh * np.pi / 4,
                        "segmentation": [polygon.tolist()],
                        "iscrowd": 0,
                    }
                )
        if federated:
            absent = sorted(set(range(first_id, num_categories + first_id)) - set(present.tolist()))
            image["neg_category_ids"] = [c for c in absent if rng.random() < 0.4]
            image["not_exhaustive_category_ids"] = [int(c) for c in present if rng.random() < 0.2]
        images.append(image)
    counts = rng.choice([3, 40, 500], num_categories)
    categories = [
        {
            "id": c + first_id,
            "name": f"c{c}",
            "image_count": int(n),
            "frequency": "rcf"[[3, 40, 500].index(n)],
        }
        for c, n in enumerate(counts)
    ]
    return {"images": images, "annotations": annotations, "categories": categories}


def make_outputs(rng, content, per_image=12, num_categories=6, first_id=1):
    """Detectron2 outputs with full-image masks near the ground truth."""
    by_image = {}
    for a in content["annotations"]:
        by_image.setdefault(a["image_id"], []).append(a)
    outputs = []
    for image in content["images"]:
        h, w = image["height"], image["width"]
        n = int(rng.integers(0, per_image))
        boxes, classes, masks = [], [], []
        for _ in range(n):
            near = by_image.get(image["id"])
            if near and rng.random() < 0.8:
                a = near[int(rng.integers(len(near)))]
                box = np.array(a["bbox"]) + rng.normal(0, 3, 4)
                c = a["category_id"] - first_id
            else:
                box = np.concatenate([rng.uniform(0, 50, 2), rng.uniform(5, 40, 2)])
                c = int(rng.integers(num_categories))
            box[2:] = np.maximum(box[2:], 1)
            mask = np.zeros((h, w), bool)
            yy, xx = np.mgrid[:h, :w] + 0.5
            centre, radius = box[:2] + box[2:] / 2, box[2:] / 2
            mask = ((xx - centre[0]) / radius[0]) ** 2 + ((yy - centre[1]) / radius[1]) ** 2 <= 1
            boxes.append([box[0], box[1], box[0] + box[2], box[1] + box[3]])
            classes.append(c)
            masks.append(mask)
        instances = Instances((h, w))
        instances.pred_boxes = Boxes(torch.tensor(np.array(boxes).reshape(-1, 4), dtype=torch.float32))
        instances.scores = torch.tensor(np.round(rng.random(n), 2), dtype=torch.float32)
        instances.pred_classes = torch.tensor(classes, dtype=torch.int64)
        instances.pred_masks = torch.tensor(np.array(masks).reshape(-1, h, w))
        outputs.append({"instances": instances})
    return [{"image_id": i["id"]} for i in content["images"]], outputs


@pytest.fixture
def register(tmp_path):
    names = []

    def add(content, evaluator_type="lvis", **metadata):
        name = f"evaluation_test_{len(names)}"
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content))
        MetadataCatalog.get(name).set(json_file=str(path), evaluator_type=evaluator_type, **metadata)
        names.append(name)
        return name

    yield add
    for name in names:
        MetadataCatalog.pop(name)
        DatasetCatalog.pop(name, None)


def run(evaluator, inputs, outputs):
    evaluator.reset()
    for i, o in zip(inputs, outputs):
        evaluator.process([i], [o])
    return evaluator.evaluate()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_workers", [0, 2])
def test_equals_detectron2_lvis_evaluator(register, tmp_path, seed, num_workers):
    rng = np.random.default_rng(seed)
    content = make_dataset(rng)
    inputs, outputs = make_outputs(rng, content)
    name = register(content)
    ours = run(
        LongTailLVISEvaluator(
            name, output_dir=str(tmp_path / "out"), num_workers=num_workers, ap_fixed=True, max_dets=8
        ),
        inputs,
        outputs,
    )
    with numpy_float():
        reference = run(LVISEvaluator(name, max_dets_per_image=8), inputs, outputs)
    assert set(ours) == {"bbox", "segm"}
    for task in reference:
        for key, value in reference[task].items():
            expected = np.nan if value == -100 else value
            np.testing.assert_allclose(ours[task][key], expected, rtol=0, atol=1e-9, err_msg=f"{task} {key}")
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    for task, metrics in ours.items():
        assert written[task] == {k: None if np.isnan(v) else pytest.approx(v) for k, v in metrics.items()}
    assert (tmp_path / "out" / "per_category.csv").read_text().count("\n") == 7


@pytest.mark.parametrize("seed", range(3))
def test_equals_detectron2_coco_evaluator(register, tmp_path, seed):
    rng = np.random.default_rng(seed)
    content = make_dataset(rng, federated=False, first_id=3)
    for a in content["annotations"]:
        if rng.random() < 0.2:
            image = next(i for i in content["images"] if i["id"] == a["image_id"])
            a["iscrowd"] = 1
            mask = mask_utils.decode(mask_utils.frPyObjects(a["segmentation"], image["height"], image["width"]))
            runs = mask[:, :, 0].T.ravel()
            change = np.flatnonzero(np.diff(np.concatenate([[0], runs, [2]]).astype(int)))
            a["segmentation"] = {
                "size": [image["height"], image["width"]],
                "counts": np.diff(np.concatenate([[0], change])).tolist(),
            }
    inputs, outputs = make_outputs(rng, content, first_id=3)
    mapping = {c["id"]: 5 - i for i, c in enumerate(content["categories"])}  # not in sorted order, on purpose
    for o in outputs:
        o["instances"].pred_classes = 5 - o["instances"].pred_classes
    name = register(
        content,
        evaluator_type="coco",
        thing_dataset_id_to_contiguous_id=mapping,
        thing_classes=[c["name"] for c in content["categories"]][::-1],
    )
    ours = run(LongTailLVISEvaluator(name), inputs, outputs)
    reference = run(
        COCOEvaluator(name, tasks=("bbox", "segm"), output_dir=str(tmp_path), use_fast_impl=False),
        inputs,
        outputs,
    )
    for task in ("bbox", "segm"):
        for key in ("AP", "AP50", "AP75", "APs", "APm", "APl"):
            expected = reference[task][key]
            np.testing.assert_allclose(ours[task][key], expected, rtol=0, atol=1e-9, err_msg=f"{task} {key}")


def test_no_predictions_give_zero_and_empty_groups_give_nan(register, tmp_path, caplog, monkeypatch):
    content = make_dataset(np.random.default_rng(1))
    for i, c in enumerate(content["categories"]):
        c["frequency"], c["image_count"] = "f", 3 * 4**i  # the plot's quantiles have none between them
    name = register(content)
    empty = Instances((10, 10), pred_boxes=Boxes(torch.zeros(0, 4)), scores=torch.zeros(0))
    empty.pred_classes = torch.zeros(0, dtype=torch.int64)
    inputs = [{"image_id": i["id"]} for i in content["images"]]
    evaluator = LongTailLVISEvaluator(name, output_dir=str(tmp_path))
    monkeypatch.setattr(logging.getLogger("lt_det"), "propagate", True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # numpy's, of means of nothing
        result = run(evaluator, inputs, [{"instances": empty}] * len(inputs))
    assert f"found nothing in the {len(inputs)} images" in caplog.text
    assert result["bbox"]["AP"] == 0 and result["bbox"]["APf"] == 0 and result["bbox"]["AR@300"] == 0
    assert np.isnan(result["bbox"]["APr"]) and np.isnan(result["bbox"]["APc"])
    assert json.loads((tmp_path / "metrics.json").read_text())["bbox"]["APr"] is None


def test_roi_masks_equal_pasted_masks(register):
    from detectron2.layers import paste_masks_in_image

    rng = np.random.default_rng(5)
    content = make_dataset(rng)
    inputs, outputs = make_outputs(rng, content)
    name = register(content)
    generator = torch.Generator().manual_seed(0)
    small, full = [], []
    for image, o in zip(content["images"], outputs):
        instances = o["instances"]
        size = (image["height"], image["width"])
        noise = torch.rand(len(instances), 28, 28, generator=generator)
        probabilities = torch.nn.functional.avg_pool2d(noise[:, None], 5, 1, 2)[:, 0] * 0.4 + 0.35
        common = {k: instances.get(k) for k in ("pred_boxes", "scores", "pred_classes")}
        small.append({"instances": Instances(size, pred_masks=ROIMasks(probabilities), **common)})
        pasted = paste_masks_in_image(probabilities, instances.pred_boxes, size)
        full.append({"instances": Instances(size, pred_masks=BitMasks(pasted), **common)})
    a = run(LongTailLVISEvaluator(name), inputs, small)
    b = run(LongTailLVISEvaluator(name), inputs, full)
    for key in a["segm"]:
        np.testing.assert_allclose(a["segm"][key], b["segm"][key], atol=1e-6)


def test_submission_gives_the_same_numbers(register, tmp_path):
    from evaluation_oracles import assert_same_numbers, official_lvis

    rng = np.random.default_rng(7)
    content = make_dataset(rng)
    inputs, outputs = make_outputs(rng, content)
    name = register(content)
    ours = run(LongTailLVISEvaluator(name, output_dir=str(tmp_path), write_submission=True), inputs, outputs)
    results = json.loads((tmp_path / "lvis_instances_results.json").read_text())
    assert len(results) == sum(len(o["instances"]) for o in outputs)
    assert_same_numbers(ours["bbox"], official_lvis(content, results, "bbox").results)
    for r in results:
        del r["bbox"]
    assert_same_numbers(ours["segm"], official_lvis(content, results, "segm").results)
    assert not list(tmp_path.glob(".*"))


def test_test_set_without_annotations_gives_a_submission_alone(register, tmp_path):
    rng = np.random.default_rng(3)
    content = make_dataset(rng)
    inputs, outputs = make_outputs(rng, content)
    name = register(dict(content, annotations=[]))
    evaluator = LongTailLVISEvaluator(name, output_dir=str(tmp_path), write_submission=True, ap_fixed=True)
    evaluator.reset()
    evaluator.process(inputs[:3], outputs[:3])  # an evaluation that is given up leaves nothing behind
    assert run(evaluator, inputs, outputs) == {}
    results = json.loads((tmp_path / "lvis_instances_results.json").read_text())
    assert len(results) == sum(len(o["instances"]) for o in outputs)
    assert [p.name for p in tmp_path.iterdir() if "results" in p.name] == ["lvis_instances_results.json"]
    assert not (tmp_path / "metrics.json").exists()


def test_errors_name_the_cause(register):
    rng = np.random.default_rng(0)
    content = make_dataset(rng)
    inputs, outputs = make_outputs(rng, content)
    name = register(content)
    with pytest.raises(ValueError, match="has no json_file"):
        LongTailLVISEvaluator("evaluation_test_unregistered")
    MetadataCatalog.pop("evaluation_test_unregistered")
    with pytest.raises(ValueError, match="tasks"):
        LongTailLVISEvaluator(name, tasks=("mask",))
    with pytest.raises(ValueError, match="needs output_dir"):
        LongTailLVISEvaluator(name, write_submission=True)
    with pytest.raises(ValueError, match="not in the ground truth"):
        run(LongTailLVISEvaluator(name), [{"image_id": 12345}], outputs[:1])
    with pytest.raises(ValueError, match="processed twice"):
        run(LongTailLVISEvaluator(name), inputs[:1] * 2, outputs[:1] * 2)
    filled = next(k for k, o in enumerate(outputs) if len(o["instances"]))
    outputs[filled]["instances"].scores[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        run(LongTailLVISEvaluator(name), inputs, outputs)
    outputs[filled]["instances"].scores[0] = 0.5
    outputs[filled]["instances"].pred_classes[0] = 77
    with pytest.raises(ValueError, match="NUM_CLASSES"):
        run(LongTailLVISEvaluator(name), inputs, outputs)


def test_ap_fixed_in_the_loop_equals_the_submission_evaluated(register, tmp_path, monkeypatch):
    """The cap of AP-fixed is settled after the loop, from a pruned log; the file evaluation knows all at
    once."""
    from lt_det.evaluation import GroundTruth, evaluate_results, evaluator, in_loop

    monkeypatch.setattr(evaluator, "_DETECTIONS_PER_CATEGORY", 5)
    monkeypatch.setattr(in_loop.ScoreLog.__init__, "__defaults__", (20,))
    rng = np.random.default_rng(11)
    content = make_dataset(rng)
    inputs, outputs = make_outputs(rng, content)
    order = np.argsort([i["image_id"] for i in inputs])  # ties go by image id in the loop, by place in a file
    inputs, outputs = [inputs[k] for k in order], [outputs[k] for k in order]
    name = register(content)
    ours = run(
        LongTailLVISEvaluator(
            name,
            output_dir=str(tmp_path),
            write_submission=True,
            ap_fixed=True,
            segm_area="box",
            boundary=True,
        ),
        inputs,
        outputs,
    )
    file_based = evaluate_results(
        GroundTruth.from_dict(content),
        tmp_path / "lvis_instances_results.json",
        iou_types=("bbox", "segm", "boundary"),
        ap_fixed=True,
        detections_per_category=5,
    )
    unlimited = evaluate_results(
        GroundTruth.from_dict(content), tmp_path / "lvis_instances_results.json", ap_fixed=True
    )
    assert unlimited.metrics["bbox"]["AP-fixed"] != file_based.metrics["bbox"]["AP-fixed"]
    for task in ("bbox", "segm", "boundary"):
        np.testing.assert_equal(dict(ours[task]), dict(file_based.metrics[task]))


@pytest.mark.parametrize("federated, roi_masks", [(True, True), (False, False)])
def test_threads_equal_the_calling_thread(register, tmp_path, federated, roi_masks):
    rng = np.random.default_rng(13)
    content = make_dataset(rng, federated=federated)
    inputs, outputs = make_outputs(rng, content)
    if roi_masks:
        yy, xx = torch.meshgrid(torch.linspace(-1, 1, 28), torch.linspace(-1, 1, 28), indexing="ij")
        disc = torch.sigmoid(8 * (0.9 - xx**2 - yy**2))
        for o in outputs:
            instances = o["instances"]
            noise = torch.from_numpy(rng.normal(0, 0.05, (len(instances), 28, 28))).float()
            instances.pred_masks = ROIMasks((disc + noise).clamp(0, 1))
    name = register(content, evaluator_type="lvis" if federated else "coco")
    written, results = {}, {}
    for number in (0, 1, 2):
        folder = tmp_path / f"threads{number}"
        evaluator = LongTailLVISEvaluator(
            name, output_dir=str(folder), write_submission=True, ap_fixed=True, boundary=True, num_workers=number
        )
        for i, o in zip(inputs, outputs):
            evaluator.process([i], [o])
            assert len(evaluator._pending) <= 4 * number
        results[folder.name] = evaluator.evaluate()
        arrays = {
            f"{path.stem} {k}": array for path in folder.glob("matches_*.npz") for k, array in np.load(path).items()
        }
        written[folder.name] = arrays, (folder / "lvis_instances_results.json").read_bytes()
    reference, *others = results.values()
    (arrays, lines), *others_written = written.values()
    assert set(reference) == {"bbox", "segm", "boundary"} and reference["segm"]["AP"] > 0
    assert len(arrays) >= 15 and len(json.loads(lines)) == sum(len(o["instances"]) for o in outputs)
    for other, (other_arrays, other_lines) in zip(others, others_written):
        np.testing.assert_equal(other, reference)
        assert other_lines == lines
        assert set(other_arrays) == set(arrays)
        for key in arrays:
            assert other_arrays[key].dtype == arrays[key].dtype
            np.testing.assert_array_equal(other_arrays[key], arrays[key], err_msg=key)


def test_failures_in_threads_reach_the_caller(register, tmp_path):
    rng = np.random.default_rng(0)
    content = make_dataset(rng)
    inputs, outputs = make_outputs(rng, content)
    name = register(content)
    evaluator = LongTailLVISEvaluator(name, num_workers=1, output_dir=str(tmp_path), write_submission=True)
    work = evaluator._work
    evaluator._work = replace(work, gt=replace(work.gt, image_sizes=work.gt.image_sizes[:1]))
    with pytest.raises(IndexError):
        run(evaluator, inputs, outputs)
    assert evaluator._pool is None
    with pytest.raises(IndexError):  # not a result without the image
        evaluator.evaluate()
    evaluator.reset()
    evaluator._work = work
    assert run(evaluator, inputs, outputs)["segm"]["AP"] > 0
    assert not list(tmp_path.glob(".*"))


def evaluate_in_processes(rank, port, path, world_size, folder):
    import torch.distributed as dist
    from detectron2.utils import comm

    torch.set_num_threads(1)  # a forked process must not use the thread pool of its parent
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    comm.create_local_process_group(world_size)
    with open(path) as f:
        content = json.load(f)
    inputs, outputs = make_outputs(np.random.default_rng(1), content)
    MetadataCatalog.get("evaluation_test_ranks").set(json_file=path, evaluator_type="lvis")
    evaluator = LongTailLVISEvaluator("evaluation_test_ranks", output_dir=folder, write_submission=True, ap_fixed=True)
    half = slice(0, 5) if rank == 0 else slice(5, None)
    result = run(evaluator, inputs[half], outputs[half])
    assert bool(result) == (rank == 0)
    if rank == 0:
        with open(f"{folder}/returned.json", "w") as f:
            json.dump(result, f)
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_equal_one(register, tmp_path):
    import socket

    content = make_dataset(np.random.default_rng(2))
    path = tmp_path / "gt.json"
    path.write_text(json.dumps(content))
    inputs, outputs = make_outputs(np.random.default_rng(1), content)
    expected = run(LongTailLVISEvaluator(register(content), ap_fixed=True), inputs, outputs)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    folder = tmp_path / "out"
    folder.mkdir()
    # fork, not spawn: two fresh imports of Detectron2 would take longer than all the rest
    torch.multiprocessing.start_processes(
        evaluate_in_processes, (port, str(path), 2, str(folder)), nprocs=2, start_method="fork"
    )
    returned = json.loads((folder / "returned.json").read_text())
    for task in expected:
        np.testing.assert_equal(returned[task], dict(expected[task]))
    results = json.loads((folder / "lvis_instances_results.json").read_text())
    assert len(results) == sum(len(o["instances"]) for o in outputs)
    assert not list(folder.glob(".*"))


def test_deferred_pasting_of_a_model_gives_the_same_numbers(register):
    """A tiny Mask R-CNN with random weights, through inference_on_dataset with and without
    DeferredMaskPasting."""
    from detectron2 import model_zoo
    from detectron2.evaluation import inference_on_dataset
    from detectron2.modeling import build_model

    from lt_det.evaluation import DeferredMaskPasting

    cfg = model_zoo.get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 6
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.RPN.CONV_DIMS = [16]
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 8
    cfg.TEST.DETECTIONS_PER_IMAGE = 8
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    content = make_dataset(np.random.default_rng(0), num_images=3)
    data = [
        {
            "image_id": i["id"],
            "height": i["height"],
            "width": i["width"],
            "image": torch.rand(3, 96, 96) * 255,
        }
        for i in content["images"]
    ]
    name = register(content)
    results = [
        inference_on_dataset(m, [[d] for d in data], LongTailLVISEvaluator(name))
        for m in (model, DeferredMaskPasting(model))
    ]
    assert set(results[0]) == {"bbox", "segm"}
    for task in results[0]:
        np.testing.assert_equal(dict(results[1][task]), dict(results[0][task]))
    wrapped = DeferredMaskPasting(model)
    a, b = model([data[0]])[0]["instances"], wrapped([data[0]])[0]["instances"]
    assert (
        isinstance(b.pred_masks, ROIMasks)
        and len(a) == len(b)
        and torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
    )
    with pytest.raises(TypeError, match="GeneralizedRCNN"):
        DeferredMaskPasting(torch.nn.Linear(1, 1))
    with pytest.raises(RuntimeError, match="for evaluation"):
        wrapped.train()([data[0]])
