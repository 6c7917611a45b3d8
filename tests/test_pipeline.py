"""Pipelines as text: parsing and printing are inverse, and mistakes are explained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fxpress
from fxpress.errors import OptionError, PipelineError
from fxpress.passes.pipeline import parse_pipeline, print_pipeline


@fxpress.register_pass
@dataclass(frozen=True)
class Sample(fxpress.Pass):
    """A pass with an option of each type."""

    name = "test-sample"
    number: int = 1
    share: float | None = None
    flag: bool = False
    text: str = ""
    names: tuple[str, ...] = ()
    choice: Literal["one", "two"] = "one"


samples = st.builds(
    Sample,
    number=st.integers(),
    share=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    flag=st.booleans(),
    text=st.text(),
    names=st.lists(st.text()).map(tuple),
    choice=st.sampled_from(["one", "two"]),
)


@given(st.lists(samples, min_size=1, max_size=4))
def test_print_then_parse_is_the_identity(passes):
    assert parse_pipeline(print_pipeline(passes)) == passes


def test_defaults_are_not_printed_and_spaces_do_not_matter():
    text = " test-sample { flag = true , names = [a, \"b,c\"] } , test-sample{} "
    passes = parse_pipeline(text)
    assert passes == [Sample(flag=True, names=("a", "b,c")), Sample()]
    assert print_pipeline(passes) == 'test-sample{flag=true,names=[a,"b,c"]},test-sample'


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", PipelineError, "empty"),
        ("fuse-batchnrom", PipelineError, "did you mean 'fuse-batchnorm'"),
        ("cleanup,", PipelineError, "ends where"),
        ("cleanup fuse-batchnorm", PipelineError, "expected ','"),
        ("test-sample{number}", PipelineError, "expected '='"),
        ("test-sample{nubmer=1}", OptionError, "did you mean 'number'"),
        ("test-sample{number=many}", OptionError, "type int"),
        ("test-sample{choice=three}", OptionError, "one, two"),
        ("test-sample{number=1,number=2}", OptionError, "twice"),
        ("test-sample{number=1", PipelineError, "ends where"),
        ('test-sample{text="open}', PipelineError, "unexpected character"),
    ],
)
def test_mistakes_are_explained(text, error, message):
    with pytest.raises(error) as caught:
        parse_pipeline(text)
    assert message in str(caught.value)
    assert "hint:" in str(caught.value)


def test_two_passes_of_one_name_are_refused():
    with pytest.raises(PipelineError, match="two passes are called"):

        @fxpress.register_pass
        @dataclass(frozen=True)
        class Other(fxpress.Pass):
            name = "test-sample"
