"""The same training, in float64, in one process and in two of gloo; imported by tests, and by the processes."""

import pytest
import torch
import torch.distributed as dist
from detectron2.modeling.proposal_generator import proposal_utils
from detectron2.utils import comm

from lt_det.data import register_dataset
from lt_det.engine import LongTailTrainer, finish_config, get_lt_det_cfg

# What makes two processes see what one sees.
COMPARABLE = [
    "SOLVER.IMS_PER_BATCH", "4",
    # A mask head's loss is a mean over the process's own foreground RoIs, in Detectron2 as here.
    "MODEL.MASK_ON", "False",
    # Statistics of a batch are its process's own.
    "MODEL.RESNETS.NORM", "LN",
    # Images of one size: padding follows from what else is in the process's batch.
    "DATALOADER.ASPECT_RATIO_GROUPING", "False", "INPUT.MIN_SIZE_TRAIN", "(64,)",
    # As many RoIs from every image: the loss is a mean over the process's RoIs.
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "8",
]  # fmt: skip


def _no_chance(n, *args, generator=None, _draw=torch.randperm, **kwargs):
    """RoIs and anchors are taken in order; the image sampler, which brings its generator, still shuffles."""
    return _draw(n, *args, generator=generator, **kwargs) if generator is not None else torch.arange(n, **kwargs)


def _train(rank, world_size, store, options, config_file, paths, out):
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
        comm.create_local_process_group(world_size)
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
    if world_size > 1:
        state = [None, None]
        dist.all_gather_object(state, mine)
        assert all(torch.equal(state[0][k], state[1][k]) for k in mine)
    if rank == 0:
        torch.save(mine, out)


def train_with_one_and_two(server, config_file, options, tiny_paths, folder):
    """The states that the two trainings end with. What each writes is in ``folder/out1`` and ``folder/out2``."""
    if torch.cuda.is_available():
        pytest.skip("float64 on two processes of the CPU")
    paths = (str(tiny_paths["train"].json_file), str(tiny_paths["train"].image_root))
    # In processes of their own: _train exchanges torch.randperm.
    states = []
    for world_size in (1, 2):
        out = folder / f"{world_size}.pth"
        mine = [*map(str, options), "OUTPUT_DIR", str(folder / f"out{world_size}")]
        run = (world_size, str(folder / "store"), mine, str(config_file), paths, out)
        processes = [server.Process(target=_train, args=(rank, *run)) for rank in range(world_size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=300)
        assert [process.exitcode for process in processes] == [0] * world_size
        states.append(torch.load(out))
    return states
