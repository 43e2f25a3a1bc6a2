"""Options: values, bounds, sources and their order. Truth: the documented rules, case by case."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from core2_sampler.config import (
    ConfigError,
    check_folder,
    convert,
    load_config,
    option,
    options_of,
)


@dataclass(frozen=True)
class Inner:
    rate: float = option(0.1, help="A rate.", min=0, max=1)


@dataclass(frozen=True)
class Example:
    inner: Inner
    name: str = option(help="A name.")
    steps: int = option(28, help="Steps.", min=1)
    share: int | float | tuple[int, ...] | None = option(None, help="A share.")
    mode: Literal["fast", "slow"] = option("fast", help="A mode.")
    flag: bool = option(False, help="A flag.")
    folder: Path = option(Path("out"), help="A folder.")
    scales: tuple[float, ...] = option((1.0,), help="Scales.", min=0)


def load(**given: object) -> Example:
    return load_config(Example, given={"name": "x", **given})


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (int, "7", 7),
        (int, 7, 7),
        (float, "0.5", 0.5),
        (float, 3, 3.0),
        (bool, "yes", True),
        (bool, "False", False),
        (str, "None", "None"),
        (Path, "a/b", Path("a/b")),
        (int | float | tuple[int, ...] | None, "7", 7),
        (int | float | tuple[int, ...] | None, "0.25", 0.25),
        (int | float | tuple[int, ...] | None, 1.0, 1.0),
        (int | float | tuple[int, ...] | None, "0,3,9", (0, 3, 9)),
        (int | float | tuple[int, ...] | None, "[0, 3]", (0, 3)),
        (int | float | tuple[int, ...] | None, [0, 3], (0, 3)),
        (int | float | tuple[int, ...] | None, "none", None),
        (str | None, None, None),
        (tuple[str, ...], ["a, b", "c"], ("a, b", "c")),
        (Literal["a", "b"], "b", "b"),
    ],
)
def test_values_become_the_type_of_their_option(kind: object, value: object, expected: object):
    converted = convert(value, kind, "x")
    assert converted == expected
    assert type(converted) is type(expected)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"steps": "2.5"}, "steps must be an integer, got '2.5'"),
        ({"steps": 2.0}, "steps must be an integer, got 2.0"),
        ({"steps": True}, "steps must be an integer, got True"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"rate": "nan"}, "rate must be a number, got 'nan'"),
        ({"rate": "inf"}, "rate must be a number, got 'inf'"),
        ({"rate": 1.5}, "rate must be at most 1, got 1.5"),
        ({"flag": "maybe"}, "flag must be true or false, got 'maybe'"),
        ({"share": "a"}, "share must be an integer or a number or a list of integers or none"),
        ({"scales": "1,-2"}, "scales must be at least 0, got -2.0"),
        ({"name": 3}, "name must be a text, got 3"),
        ({"mode": "fats"}, "did you mean 'fast'?"),
    ],
)
def test_a_bad_value_is_refused_with_what_must_hold(given: dict[str, object], text: str):
    with pytest.raises(ConfigError) as error:
        load(**given)
    assert text in str(error.value)


def test_sources_win_in_order(tmp_path: Path):
    file = tmp_path / "c.yaml"
    file.write_text("name: from file\nsteps: 5\nmode: slow\nrate: 0.2\n")
    config = load_config(
        Example, file=file, given={"steps": "6", "rate": "0.3"}, overrides=["rate=0.4"]
    )
    assert (config.name, config.mode) == ("from file", "slow")
    assert (config.steps, config.inner.rate) == (6, 0.4)
    assert config.folder == Path("out")


@pytest.mark.parametrize("source", ["file", "given", "override"])
def test_an_unknown_key_is_refused_wherever_it_stands(tmp_path: Path, source: str):
    file = tmp_path / "c.yaml"
    file.write_text("stepz: 5\n" if source == "file" else "name: x\n")
    with pytest.raises(ConfigError, match="'stepz'; did you mean 'steps'"):
        load_config(
            Example,
            file=file,
            given={"stepz": 5} if source == "given" else {},
            overrides=["stepz=5"] if source == "override" else [],
        )


def test_a_required_option_must_be_given():
    with pytest.raises(ConfigError, match="name must be given: A name."):
        load_config(Example)


@pytest.mark.parametrize(
    ("content", "text"),
    [("- a\n", "must hold a mapping"), ("a: [\n", "must be valid YAML"), (None, "readable file")],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, content: str | None, text: str):
    file = tmp_path / "c.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=text):
        load_config(Example, file=file)


@pytest.mark.parametrize("text", ["steps", "a b=3", "=3"])
def test_an_override_must_be_key_and_value(text: str):
    with pytest.raises(ConfigError, match="key=value"):
        load_config(Example, overrides=[text])


def test_options_that_do_not_go_together_are_bad_input():
    @dataclass(frozen=True)
    class Checked:
        a: int = option(1, help="A number.")

        def __post_init__(self) -> None:
            if self.a == 3:
                raise ValueError("a must not be 3, got 3")

    with pytest.raises(ConfigError, match="a must not be 3"):
        load_config(Checked, given={"a": 3})


def test_an_option_cannot_be_declared_twice():
    @dataclass(frozen=True)
    class Twice:
        inner: Inner
        rate: float = option(1.0, help="Again.")

    with pytest.raises(TypeError, match="rate"):
        options_of(Twice)


@dataclass(frozen=True)
class Drawing:
    prompts: tuple[str, ...] = option(help="What to draw.", positional=True)
    names: tuple[str, ...] = option((), help="Names.")


@pytest.mark.parametrize("source", ["file", "override"])
def test_a_prompt_may_have_commas(tmp_path: Path, source: str):
    text, listed = "a red circle, on white", "[a star, a ring]"
    for given, expected in ((text, (text,)), (listed, ("a star", "a ring"))):
        (tmp_path / "c.yaml").write_text(f"prompts: {given}\n")
        config = load_config(
            Drawing,
            file=tmp_path / "c.yaml" if source == "file" else None,
            overrides=["names=a,b", *([f"prompts={given}"] if source == "override" else [])],
        )
        assert config == Drawing(expected, ("a", "b"))


def test_a_folder_that_can_be_made_is_an_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path, tmp_path / "new/deep", Path("out"), Path(".")):
        check_folder(path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="output must be a folder, got the file file"):
        check_folder(Path("file"))
    with pytest.raises(ConfigError, match="out must be .*, got file/x/y: file is not a folder"):
        check_folder(Path("file/x/y"), "out")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_folder_that_is_not_ours_is_no_output(tmp_path: Path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="cannot be written to"):
        check_folder(tmp_path / "new")
