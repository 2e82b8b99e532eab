"""Values of a configuration are of the kind and size that is meant, or one line says which is not."""

import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsuav.configs import DEEPEST, LARGEST, made, network_config
from vsuav.unet import UNetConfig
from vsuav.vae import VAEConfig


@dataclass(frozen=True)
class Some:
    width: int = 8
    layers_per_block: int = 1
    places: tuple[int, ...] | None = None
    scale: float = 1.0
    shift: float = 0.0
    kinds: tuple[str, ...] = ("a",)
    on: bool = True

    FIXED = {"act_fn": ("silu",)}
    IGNORED = ("sample_size",)
    FREE = ("places", "shift")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"width": 0}, f"width must be a whole number between 1 and {LARGEST}, got 0"),
        ({"width": -32}, "got -32"),
        ({"width": 8.0}, "got 8.0"),
        ({"width": True}, "got True"),
        ({"width": "8"}, "got '8'"),
        ({"width": 10**12}, "got 1000000000000"),
        ({"layers_per_block": DEEPEST + 1}, f"between 1 and {DEEPEST}, got {DEEPEST + 1}"),
        ({"places": [0, -1]}, f"a list, each of it a whole number between 0 and {LARGEST} or null, got (0, -1)"),
        ({"places": 3}, "got 3"),
        ({"scale": 0}, "scale must be a finite number above 0, got 0"),
        ({"scale": math.nan}, "got nan"),
        ({"scale": math.inf}, "got inf"),
        ({"scale": None}, "got None"),
        ({"shift": "0"}, "shift must be a finite number, got '0'"),
        ({"kinds": "ab"}, "kinds must be a list, each of it a text, got 'ab'"),
        ({"on": 1}, "on must be true or false, got 1"),
    ],
)
def test_other_values_are_refused(values, says):
    with pytest.raises(ValueError) as caught:
        made(Some, values)
    assert str(caught.value).startswith("Some: ") and says in str(caught.value)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "width": st.integers(1, LARGEST), "layers_per_block": st.integers(1, DEEPEST),
            "places": st.none() | st.lists(st.integers(0, LARGEST)), "scale": st.floats(1e-9, 1e9),
            "shift": st.floats(-1e9, 1e9) | st.integers(-9, 9), "kinds": st.lists(st.text()), "on": st.booleans(),
        },
    )
)  # fmt: skip
def test_what_is_meant_comes_back(values):
    kept = made(Some, values)
    for name, value in values.items():
        assert getattr(kept, name) == (tuple(value) if isinstance(value, list) else value)


def test_keys():
    config = {"width": 4, "_class_name": "X", "sample_size": 64, "act_fn": "silu", "dropout": 0.0, "extra": None}
    assert network_config(Some, config) == Some(width=4)
    with pytest.raises(ValueError, match="Some: act_fn must be 'silu', got 'gelu'"):
        network_config(Some, {"act_fn": "gelu"})
    with pytest.raises(ValueError, match=r"Some: unknown setting dropout = 0.1"):
        network_config(Some, {"dropout": 0.1})


@pytest.mark.parametrize("config", [UNetConfig, VAEConfig])
def test_the_defaults_are_of_their_own_kinds(config):
    assert made(config, vars(config())) == config()
