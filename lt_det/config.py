"""Every configuration key that lt_det adds to Detectron2's defaults, each with its meaning."""

import io
import os

import yaml
from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg

from lt_det.data import samplers_with_options
from lt_det.declaration import default_node, shared_node
from lt_det.frequency import GROUP_LIMITS
from lt_det.losses import LOSS_REGISTRY
from lt_det.model_zoo import get_config_file
from lt_det.modeling import CALIBRATOR_REGISTRY


class _RecipeFiles(CN):
    """Reads config files whose ``_BASE_`` may name recipes."""

    @classmethod
    def _open_cfg(cls, filename):
        with super()._open_cfg(filename) as file:
            text = file.read()
        try:
            content = yaml.safe_load(text)
        except yaml.YAMLError:  # Detectron2 reads it next and says what is wrong
            return io.StringIO(text)
        if not (isinstance(content, dict) and content.get("_BASE_")):
            return io.StringIO(text)
        bases = content["_BASE_"]
        content["_BASE_"] = [_base_path(b, filename) for b in ([bases] if isinstance(bases, str) else bases)]
        return io.StringIO(yaml.safe_dump(content))


def _base_path(base: str, filename: str) -> str:
    """``base`` where it is a file, as seen from the config file that names it; else the path of lt_det's or of
    Detectron2's recipe."""
    there = os.path.join(os.path.dirname(filename), os.path.expanduser(base))
    if base.startswith(("http://", "https://")) or os.path.isfile(there):
        return base
    try:
        return get_config_file(base)
    except ValueError as error:
        raise FileNotFoundError(f"{filename}: _BASE_ {base} is no file beside it, and {error}") from None


def get_lt_det_cfg() -> CN:
    """Detectron2's default config with lt_det's keys."""
    cfg = get_cfg()
    add_lt_det_config(cfg)
    return cfg


def merge_config_file(cfg: CN, path: str) -> None:
    """``cfg.merge_from_file(path)``, but for ``_BASE_``, which may also name a recipe of lt_det's (``"lvis_balms"``)
    or of Detectron2's model zoo (``"COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"``), wherever these are
    installed. A file of that name, as seen from the config file, goes first.

    Raises:
        FileNotFoundError: a base is neither a file nor a recipe.
    """
    content = _RecipeFiles.load_yaml_with_base(path, allow_unsafe=True)
    if content.get("VERSION", cfg.VERSION) != cfg.VERSION:
        cfg.merge_from_file(path)  # Detectron2 brings old files up to date
    else:
        cfg.merge_from_other_cfg(CN(content))


def add_lt_det_config(cfg: CN) -> None:
    """Add lt_det's keys to a Detectron2 config, in place.

    With the defaults a model trains as stock Detectron2 does (to the rounding of the loss); to use a long-tail
    method set ``MODEL.ROI_HEADS.NAME`` to ``LongTailROIHeads`` (``LongTailCascadeROIHeads`` for a cascade,
    ``LongTailRes5ROIHeads`` for C4) and ``MODEL.LONG_TAIL.LOSS`` to a name in ``LOSS_REGISTRY``.
    """
    _add_long_tail(cfg)
    _add_decouple(cfg)
    _add_drw(cfg)
    _add_teacher(cfg)
    _add_meta(cfg)
    _add_data(cfg)
    _add_evaluation(cfg)
    if "FLOAT32_PRECISION" not in cfg:  # newer Detectron2 has it itself
        # Precision of float32 matrix products and convolutions on a GPU: "highest" (no TF32), "high", "medium", or
        # "", as PyTorch has it.
        cfg.FLOAT32_PRECISION = ""


def _add_long_tail(cfg: CN) -> None:
    lt = cfg.MODEL.LONG_TAIL = CN()
    # Classification loss of the box head: a name in lt_det.losses.LOSS_REGISTRY.
    lt.LOSS = "Softmax"
    # What the class prior does to the background score: "keep" (no shift; the background prior stays as
    # trained), or another rule that the loss offers (see the loss's docstring).
    lt.BACKGROUND = "keep"
    # Where the class prior comes from: "image_count", "instance_count", "sampled" (expected instances under
    # the training sampler's repeat factors) or "online" (running counts of the foreground RoIs seen).
    lt.PRIOR = "image_count"
    # Counts below this are raised to it before they become a prior; 0 makes a class without training
    # images an error that names it.
    lt.MIN_COUNT = 0
    # json file with class statistics (ClassStatistics.to_json, an LVIS / COCO annotation file, or a list of
    # categories). Empty: taken from DATASETS.TRAIN.
    lt.STATISTICS = ""

    lt.CLASSIFIER = CN()
    # "linear", "cosine" (feature and weight L2-normalised, times a scale), or "": the one that the loss asks for.
    lt.CLASSIFIER.NAME = ""
    # Scale of the cosine classifier (losses that scale themselves, as LDAM does, ignore it).
    lt.CLASSIFIER.SCALE = 20.0
    # Learn that scale.
    lt.CLASSIFIER.LEARN_SCALE = False
    # Give the cosine classifier a bias. Losses of sigmoids have one in any case, unless their BIAS_PRIOR is 0.
    lt.CLASSIFIER.BIAS = False

    # Factor on the cosines of the mask head NormalizedMaskRCNNConvUpsampleHead (MODEL.ROI_MASK_HEAD.NAME).
    lt.MASK_SCALE = 20.0

    # Calibration of a trained model's scores at inference. It changes no weight: try it with --eval-only, or all
    # values at once with tools/sweep_calibration.py.
    # NAME: a name in lt_det.modeling.CALIBRATOR_REGISTRY, or "" (none). The other keys are the options of the
    # calibrators, with their defaults, as their classes declare them; one that the chosen calibrator lacks is an error.
    lt.CALIBRATOR = CN({"NAME": "", **shared_node(CALIBRATOR_REGISTRY)})
    _add_losses(lt)


def _add_losses(lt: CN) -> None:
    """The options of each loss, in a node named after it. Names, defaults and meanings are declared in its class."""
    for _, loss in LOSS_REGISTRY:
        node = default_node(loss)
        if node:
            setattr(lt, loss.config_node, CN(node))


def _add_decouple(cfg: CN) -> None:
    # Stage 2 of decoupled training (Kang et al., ICLR 2020; BALMS): the trunk is frozen and the classifier
    # alone is trained on, with its own loss, sampler and learning-rate schedule.
    cfg.DECOUPLE = CN()
    cfg.DECOUPLE.ENABLED = False
    # Iteration at which stage 2 starts. -1: when SOLVER.MAX_ITER iterations of stage 1 are done. 0: at once, from the
    # finished model in MODEL.WEIGHTS.
    cfg.DECOUPLE.START_ITER = -1
    # Length of stage 2, in iterations.
    cfg.DECOUPLE.MAX_ITER = 22000
    # Loss, prior and background rule of stage 2. Empty prior or rule: as in MODEL.LONG_TAIL.
    cfg.DECOUPLE.LOSS = "BalancedSoftmax"
    cfg.DECOUPLE.PRIOR = ""
    cfg.DECOUPLE.BACKGROUND = ""
    # Training sampler of stage 2. Empty: DATALOADER.SAMPLER_TRAIN.
    cfg.DECOUPLE.SAMPLER_TRAIN = ""
    # Learning rate of stage 2, decayed by SOLVER.GAMMA at each of STEPS (counted from the start of stage 2);
    # SOLVER.LR_SCHEDULER_NAME, momentum and weight decay are shared with stage 1.
    cfg.DECOUPLE.BASE_LR = 0.02
    cfg.DECOUPLE.STEPS = (11000, 18000)
    cfg.DECOUPLE.WARMUP_ITERS = 1000
    # Start the classifier afresh (classifier re-training, cRT) rather than from stage 1's weights.
    cfg.DECOUPLE.REINIT_CLASSIFIER = False
    # Evaluate, and keep a checkpoint (model_stage1.pth), when stage 1 ends.
    cfg.DECOUPLE.EVAL_STAGE1 = True

    # Compute the RoI features of the training set once and train stage 2 on them. Every image then keeps one
    # augmentation and one sample of RoIs; an iteration is ten times faster or more.
    cfg.DECOUPLE.FEATURE_CACHE = CN()
    cfg.DECOUPLE.FEATURE_CACHE.ENABLED = False
    # Folder, seen by all GPUs. Empty: roi_features in lt_det's cache ($LT_DET_CACHE, else ~/.cache/lt_det).
    cfg.DECOUPLE.FEATURE_CACHE.DIR = ""
    # RoIs stored of an image. 0: MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE. Each takes 2 bytes times the width of the box
    # head.
    cfg.DECOUPLE.FEATURE_CACHE.ROIS_PER_IMAGE = 0


def _add_meta(cfg: CN) -> None:
    # BALMS's meta step in stage 2 of decoupled training (Ren et al., NeurIPS 2020): class rates are learned so that
    # a step of the classifier on RoIs weighted by them lowers a plain loss on class-balanced batches.
    cfg.META = CN()
    # "" (none), "MetaReweighter" (rates weight the RoIs' losses) or "MetaSampler" (rates resample the RoIs; with
    # DECOUPLE.SAMPLER_TRAIN "MetaSampler", the images instead).
    cfg.META.NAME = ""
    # Learning rate of Adam on the logits of the rates.
    cfg.META.LR = 0.01
    # Iterations from one meta step to the next. The rates in between stay.
    cfg.META.PERIOD = 1
    # Loss on the meta batches, a name in LOSS_REGISTRY, with DECOUPLE.PRIOR and DECOUPLE.BACKGROUND. Empty: "Softmax"
    # or "Sigmoid", as fits DECOUPLE.LOSS. The name of DECOUPLE.LOSS: shifted as in the published LVIS code.
    cfg.META.LOSS = ""
    # Sampler of the meta batches, which come from DATASETS.TRAIN.
    cfg.META.SAMPLER = "ClassBalancedSampler"
    # Give all classes of a meta batch the same weight in that loss. Else each foreground RoI has the same, and of
    # class-balanced images most RoIs are still of frequent classes.
    cfg.META.BALANCE_ROIS = False
    # Images in a meta batch, over all GPUs. 0: SOLVER.IMS_PER_BATCH.
    cfg.META.IMS_PER_BATCH = 0


def _add_teacher(cfg: CN) -> None:
    # The detector whose features of ground-truth boxes are the keys of MODEL.LONG_TAIL.LOSS "GML". With all keys at
    # their defaults it is a copy of the student that follows it.
    cfg.TEACHER = CN()
    # Checkpoint of a finished detector, which stays frozen.
    cfg.TEACHER.WEIGHTS = ""
    # Config file of that detector. Empty: the student's own config.
    cfg.TEACHER.CONFIG = ""
    # Train the teacher in this run first, for so many iterations by the loss's L_cls alone (SOLVER's schedule, its
    # steps scaled); the student then starts afresh, for SOLVER.MAX_ITER iterations. 0: no.
    cfg.TEACHER.MAX_ITER = 0
    # Evaluate the teacher so trained.
    cfg.TEACHER.EVAL = True
    # Share of its own weights that a teacher keeps at each step, where it follows the student.
    cfg.TEACHER.MOMENTUM = 0.999
    # Let the teacher look at training images before the student's first step, until the queues are full.
    cfg.TEACHER.FILL_QUEUES = True


def _add_drw(cfg: CN) -> None:
    # Deferred re-weighting (Cao et al., NeurIPS 2019, algorithm 1), for a loss that knows it (LDAM).
    cfg.DRW = CN()
    cfg.DRW.ENABLED = False
    # Iteration from which rows are weighted by the effective number of their class. -1: after 80 % of SOLVER.MAX_ITER.
    cfg.DRW.START_ITER = -1
    # Factor on the learning rate from there on, beside those of the schedule. 1: none.
    cfg.DRW.LR_FACTOR = 0.1


def _add_data(cfg: CN) -> None:
    # Data sets named without code: a list of (name, annotations.json, image folder), in LVIS or COCO
    # format. The names can then stand in DATASETS.TRAIN and DATASETS.TEST.
    cfg.DATASETS.REGISTER = []
    # Where the categories of a test set have no "frequency": classes in up to so many training images are rare, up to
    # so many common, above frequent. (LVIS's.)
    cfg.DATASETS.FREQUENCY_THRESHOLDS = GROUP_LIMITS

    # Options of samplers (DATALOADER.SAMPLER_TRAIN) that Detectron2 has no key for.
    for key, default in shared_node(samplers_with_options()).items():
        cfg.DATALOADER.setdefault(key, default)

    # Paste objects of other training images into training images (Ghiasi et al., CVPR 2021), for any recipe with masks.
    cfg.INPUT.COPY_PASTE = CN()
    cfg.INPUT.COPY_PASTE.ENABLED = False
    # Share of the images that something is pasted into.
    cfg.INPUT.COPY_PASTE.PROB = 0.5
    # Objects pasted into such an image; each costs the reading of the image that it comes from.
    cfg.INPUT.COPY_PASTE.NUM_OBJECTS = 2
    # What is pasted: a class is drawn in proportion to (its instances)^(1 - CLASS_POWER). 1: all classes alike; 0: as
    # they come.
    cfg.INPUT.COPY_PASTE.CLASS_POWER = 1.0
    # Smallest and largest factor on a pasted object's size in pixels.
    cfg.INPUT.COPY_PASTE.SCALE = (0.5, 1.5)
    # An object of whose mask a smaller share than this is left uncovered is dropped.
    cfg.INPUT.COPY_PASTE.MIN_VISIBLE = 0.1


def _add_evaluation(cfg: CN) -> None:
    # Report AP-fixed (10,000 detections a category over the data set, no cap an image) and AP-pool too. They need more
    # detections than AP counts: a larger TEST.DETECTIONS_PER_IMAGE than TEST.MAX_DETS.
    cfg.TEST.AP_FIXED = False
    # How many detections of an image AP counts, the best of those that the model gives (with COCO's rules: of an image
    # and category). 0: LVIS's 300, COCO's 100.
    cfg.TEST.MAX_DETS = 0
    # Report boundary AP too.
    cfg.TEST.BOUNDARY_AP = False
    # Write the results json for the LVIS server.
    cfg.TEST.WRITE_SUBMISSION = False
    # Draw AP by category and group, and precision-recall by group.
    cfg.TEST.PLOTS = False
    # Write report.html, a page that opens in a browser, and report_thresholds.csv beside the metrics; the results json
    # is written too, for the errors and pictures on the page.
    cfg.TEST.REPORT = False
    # The checkpoint to keep as model_best.pth is that of the best value of this metric, as evaluation names it
    # ("segm/AP", "segm/APr", "bbox/AP", ...), or of "validation/total_loss", which is best when smallest. Empty: none.
    # It is looked at whenever there is an evaluation: TEST.EVAL_PERIOD (TEST.VALIDATION_LOSS.PERIOD).
    cfg.TEST.BEST_METRIC = ""
    # Stop when that metric has not improved in so many evaluations of the last stage. 0: never.
    cfg.TEST.PATIENCE = 0

    # Compute the training losses on DATASETS.TEST too, as validation/... in the training's metrics.
    cfg.TEST.VALIDATION_LOSS = CN()
    # Iterations from one time to the next. 0: never.
    cfg.TEST.VALIDATION_LOSS.PERIOD = 0
    # Images of each data set, evenly spread over it. 0: all.
    cfg.TEST.VALIDATION_LOSS.IMAGES = 500
    # Iterations between points of accuracy, score and prior by frequency group in TensorBoard. 0: none.
    cfg.TEST.GROUP_SCALARS_PERIOD = 20
