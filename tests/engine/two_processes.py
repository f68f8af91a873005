"""The same training, in float64, in one process and in two of gloo; imported by tests, and by the processes."""

import socket

import pytest
import torch
import torch.multiprocessing as mp
from detectron2.engine import launch
from detectron2.modeling.proposal_generator import proposal_utils

from lt_det.data import register_dataset
from lt_det.engine import LongTailTrainer, finish_config, get_lt_det_cfg

# What makes two processes see what one sees.
COMPARABLE = [
    "SOLVER.IMS_PER_BATCH", "4",
    # A mask head's loss is a mean over the process's own foreground RoIs, in Detectron2 as here.
    "MODEL.MASK_ON", "False",
    # Statistics of a batch are its process's own.
    "MODEL.RESNETS.NORM", "GN",
    # Images of one size: padding follows from what else is in the process's batch.
    "DATALOADER.ASPECT_RATIO_GROUPING", "False", "INPUT.MIN_SIZE_TRAIN", "(64,)",
    # As many RoIs from every image: the loss is a mean over the process's RoIs.
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "8",
]  # fmt: skip


def _no_chance(n, *args, generator=None, _draw=torch.randperm, **kwargs):
    """RoIs and anchors are taken in order; the image sampler, which brings its generator, still shuffles."""
    return _draw(n, *args, generator=generator, **kwargs) if generator is not None else torch.arange(n, **kwargs)


def _train(options, config_file, paths, out):
    torch.set_num_threads(1)
    # Sums come out in another order on other processors, and in batches of another size: in double that is 1e-15.
    torch.set_default_dtype(torch.float64)
    # Detectron2's NMS makes the boxes float32, and torchvision's wants scores of the same type.
    nms = proposal_utils.batched_nms
    proposal_utils.batched_nms = lambda boxes, scores, *rest: nms(boxes, scores.float(), *rest)
    torch.randperm = _no_chance
    register_dataset("tiny_train", *paths)
    cfg = get_lt_det_cfg()
    cfg.merge_from_file(config_file)
    cfg.merge_from_list(options)
    finish_config(cfg)
    torch.manual_seed(0)
    trainer = LongTailTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    mine = dict(trainer.detector.state_dict())
    if trainer.meta is not None:
        mine["rates"] = trainer.meta.learner.rates
    if trainer.mutual_information is not None:
        for name, module in (
            ("branches", trainer.mutual_information.branches),
            ("teacher", trainer.mutual_information.teacher),
        ):
            mine.update({f"{name}.{key}": value for key, value in module.state_dict().items()})
    if torch.distributed.is_initialized():
        state = [None, None]
        torch.distributed.all_gather_object(state, mine)
        assert all(torch.equal(state[0][k], state[1][k]) for k in mine)
        if torch.distributed.get_rank() == 1:
            return
    torch.save(mine, out)


def _run(world_size, options, config_file, paths, out):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launch(_train, world_size, dist_url=f"tcp://127.0.0.1:{port}", args=(options, config_file, paths, str(out)))


def train_with_one_and_two(config_file, options, tiny_paths, folder):
    """The states that the two trainings end with. What each writes is in ``folder/out1`` and ``folder/out2``."""
    if torch.cuda.is_available():
        pytest.skip("Detectron2's launcher would take NCCL and the GPUs")
    paths = (str(tiny_paths["train"].json_file), str(tiny_paths["train"].image_root))
    # In processes of their own: _train exchanges torch.randperm.
    context = mp.get_context("spawn")
    states = []
    for world_size in (1, 2):
        out = folder / f"{world_size}.pth"
        mine = [*map(str, options), "OUTPUT_DIR", str(folder / f"out{world_size}")]
        process = context.Process(target=_run, args=(world_size, mine, str(config_file), paths, out))
        process.start()
        process.join(timeout=300)
        assert process.exitcode == 0
        states.append(torch.load(out))
    return states
