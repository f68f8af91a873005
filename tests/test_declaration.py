"""lt_det.declaration: options are stated once, in the class."""

import subprocess
import sys

import pytest
from fvcore.common.registry import Registry

from lt_det.config import get_lt_det_cfg
from lt_det.declaration import check_name, checked_options, declared_options, default_node, lookup
from lt_det.losses import LOSS_REGISTRY
from lt_det.modeling import build_loss


class Base:
    """Of all.

    Args:
        strength: what the base says.
    """


class Method(Base):
    """A method.

    Args:
        first, second: two
            alike.
        common: not an option.
    """

    shared_arguments = ("common",)

    def __init__(self, size, *, first=1.5, second=(2, 3), strength="a", common=0, needed, **rest):
        pass


def test_options_come_from_the_class():
    options = declared_options(Method)
    assert [(o.name, o.key, o.default, o.type, o.comment) for o in options] == [
        ("first", "FIRST", 1.5, float, "two alike."),
        ("second", "SECOND", (2, 3), tuple, "two alike."),
        ("strength", "STRENGTH", "a", str, "what the base says."),
    ]
    assert default_node(Method) == {"FIRST": 1.5, "SECOND": (2, 3), "STRENGTH": "a"}
    assert checked_options(Method, {"FIRST": 2, "strength": "b"}, "here") == {"first": 2, "strength": "b"}


def test_errors_name_what_there_is():
    with pytest.raises(ValueError, match=r"NODE: Method has no option STRENGHT; did you mean STRENGTH\?") as e:
        checked_options(Method, {"STRENGHT": 1}, "NODE")
    assert "FIRST, SECOND, STRENGTH" in str(e.value)
    registry = Registry("THING")
    registry.register(Method)
    with pytest.raises(ValueError, match=r"SOME.KEY is 'method'.*did you mean Method\? Known: Method"):
        lookup(registry, "method", "SOME.KEY")
    assert lookup(registry, "Method", "SOME.KEY") is Method


@pytest.mark.parametrize("name", sorted(name for name, _ in LOSS_REGISTRY))
def test_every_option_of_a_loss_is_explained(name):
    assert not [o.name for o in declared_options(LOSS_REGISTRY.get(name)) if not o.comment]


def test_a_loss_and_an_option_that_do_not_exist():
    cfg = get_lt_det_cfg()
    cfg.MODEL.LONG_TAIL.LOSS = "BalancedSoftMax"
    with pytest.raises(ValueError, match=r"MODEL.LONG_TAIL.LOSS is 'BalancedSoftMax'.*did you mean BalancedSoftmax"):
        build_loss(cfg)
    cfg.MODEL.LONG_TAIL.LOSS = "LDAM"
    cfg.MODEL.LONG_TAIL.LDAM.MARGIN = 0.5
    with pytest.raises(ValueError, match=r"MODEL.LONG_TAIL.LDAM: LDAM has no option MARGIN.*MAX_MARGIN"):
        build_loss(cfg)


def test_bottom_layer():
    code = "import sys, lt_det.declaration; sys.exit(any(m.split('.')[0] == 'detectron2' for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_empty_name_is_named():
    with pytest.raises(ValueError, match=r"NAME is 'x', and there is none of that name\. Known: '' \(none\), NorCal$"):
        check_name("NAME", "x", ["NorCal", ""])
