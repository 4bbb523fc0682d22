from typing import Literal

import pytest

from raptide.config import Settings, load_settings
from raptide.errors import ConfigError


class Inner(Settings):
    size: int = 1


class Outer(Settings):
    name: str
    inner: Inner = Inner()
    rate: float = 0.5


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("name: a\ninner:\n  size: 3\n")
    return path


def test_overrides_go_on_top_of_the_file(file):
    settings = load_settings(Outer, file, ["inner.size=7", "rate=1e-4"])
    assert (settings.name, settings.inner.size, settings.rate) == ("a", 7, 1e-4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("inner.sise=1", "no setting `inner.sise`; did you mean `size`"),
        ("inner.size=many", "`inner.size` is 'many'"),
        ("rate", "section.field=value"),
        ("name.x=1", "`name` is a value, not a section"),
    ],
)
def test_a_bad_field_is_one_sentence_with_its_place(file, override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_settings(Outer, file, [override])
    assert "\n" not in str(caught.value)


class Wide(Settings):
    name: str = "x"
    path: str | None = None
    several: str | list[dict[str, float | str]] = ""
    kind: Literal["auto", "0300"] = "auto"
    count: int | None = 1
    pair: int | tuple[int, int] = 1
    rate: float = 0.5
    flag: bool = False


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("path=/d/c #2", "/d/c #2"),
        ("path=/d/m: x", "/d/m: x"),
        ("name=0300", "0300"),
        ("name=2024-01-31", "2024-01-31"),
        ("name=yes", "yes"),
        ("name=a=b", "a=b"),
        ("name=[x]", "[x]"),
        ("path=null", None),
        ("several=/d/c #1", "/d/c #1"),
        ("several=[{path: a, weight: 2}]", [{"path": "a", "weight": 2}]),
        ("kind=0300", "0300"),
        ("count=0300", 300),
        ("count=1e3", 1000),
        ("count=-7", -7),
        ("pair=[1, 04]", (1, 4)),
        ("rate=1e-4", 1e-4),
        ("rate=.5", 0.5),
        ("rate=3", 3.0),
        ("flag=true", True),
        ("flag=no", False),
    ],
)
def test_an_override_means_what_it_says(tmp_path, override, value):
    (tmp_path / "empty.yaml").write_text("")
    settings = load_settings(Wide, tmp_path / "empty.yaml", [override])
    assert getattr(settings, override.partition("=")[0]) == value


@pytest.mark.parametrize(
    "override", ["count=1:30", "count=0x10", "count=1.5", "count=1e-3", "rate=1:30", "flag=2"]
)
def test_what_is_no_decimal_number_is_refused(tmp_path, override):
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ConfigError, match=f"`{override.partition('=')[0]}"):
        load_settings(Wide, tmp_path / "empty.yaml", [override])


def test_numbers_in_files_are_decimal_too(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("count: 0300\nrate: 1e3\nname: 2024-01-31\npair: [010, 1e1]\n")
    settings = load_settings(Wide, path)
    assert (settings.count, settings.rate, settings.name, settings.pair) == (
        *(300, 1000.0),
        *("2024-01-31", (10, 10)),
    )


def test_a_missing_file_a_missing_field_and_broken_yaml_are_refused(tmp_path):
    path = tmp_path / "x.yaml"
    with pytest.raises(ConfigError, match="Cannot read"):
        load_settings(Outer, path)
    path.write_text("inner: {}")
    with pytest.raises(ConfigError, match="`name` is required"):
        load_settings(Outer, path)
    path.write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_settings(Outer, path)


def test_a_file_builds_on_another_section_by_section(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base/all.yaml").write_text("name: low\nrate: 0.1\ninner: {size: 4}\n")
    (tmp_path / "own.yaml").write_text("base: base/all.yaml\nname: high\ninner: {}\n")
    settings = load_settings(Outer, tmp_path / "own.yaml")
    assert (settings.name, settings.rate, settings.inner.size) == ("high", 0.1, 4)
    assert load_settings(Outer, tmp_path / "own.yaml", ["inner.size=2"]).inner.size == 2
    (tmp_path / "base/all.yaml").write_text("base: ../own.yaml\n")
    with pytest.raises(ConfigError, match="builds on itself"):
        load_settings(Outer, tmp_path / "own.yaml")
    (tmp_path / "base/all.yaml").unlink()
    with pytest.raises(ConfigError, match=r"Cannot read the settings file .*all.yaml"):
        load_settings(Outer, tmp_path / "own.yaml")
