"""The configuration file: below variables, above profiles, every value with its place, every mistake with a line."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.settings.definitions import SETTINGS
from service.settings.resolve import FILE_BYTES, Resolved, SettingError, resolve


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "nemoserve.yaml"


def test_flag_variable_alias_file_profile_default_in_this_order(config: Path) -> None:
    config.write_text("grpc_port: 4\nprecision: int4\n")
    profile = "mistral-nemo-12b-instruct/h100-fp8-kvfp8-tp1"
    environ = {"NEMOSERVE_CONFIG": str(config), "NEMOSERVE_PROFILE": profile}
    port, source = "grpc_port", f"file {config}: grpc_port"
    assert resolve({}, environ)[port] == Resolved(4, source)
    assert resolve({}, environ | {"NIM_GRPC_API_PORT": "3"})[port] == Resolved(3, "NIM_GRPC_API_PORT")
    assert resolve({}, environ | {"NEMOSERVE_GRPC_PORT": "2", "NIM_GRPC_API_PORT": "3"})[port].value == 2
    assert resolve({"grpc_port": "1"}, environ)[port] == Resolved(1, "--grpc-port")
    found = resolve({}, environ)
    assert found["precision"] == Resolved("int4", f"file {config}: precision")
    assert found["kv_precision"] == Resolved("fp8", f"profile {profile}")
    assert found["max_batch_size"] == Resolved(None, "default")


def test_a_profile_may_stand_in_the_file(config: Path) -> None:
    config.write_text("profile: m/h100-fp8-tp1\n")
    assert resolve({"config": str(config)}, {})["device"] == Resolved("cuda", "profile m/h100-fp8-tp1")


def test_names_may_be_written_as_flags_are_and_values_are_what_flags_take(config: Path) -> None:
    config.write_text('# ours\nmax-model-len: 8192\nkv_memory: 4Gi\nprefix_caching: off\nserved_model_name: "on"\n')
    found = resolve({"config": str(config)}, {})
    assert found["max_model_len"] == Resolved(8192, f"file {config}: max-model-len")
    assert (found["kv_memory"].value, found["prefix_caching"].value) == (4 * 2**30, False)
    assert found["served_model_name"].value == ("on",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("max_batchsize: 3", r"max_batchsize: is no setting; did you mean max_batch_size\?"),
        ("xyzzy: 3", r"xyzzy: is no setting$"),
        ("config: other.yaml", "config: is no setting"),
        ("grpc_port: 70000", r"grpc_port: '70000' must be between 0 and 65535"),
        ("drain_timeout: 1:30", "drain_timeout: '1:30' must be a number of seconds"),
        ("model:", "model: '' must not be empty"),
        ("model: [a, b]", "model: must be one value, not a list or a section"),
        ("serve:\n  model: a", "serve: must be one value, not a list or a section"),
        ("model: a\nmodel: b", "model: stands there twice"),
        ("max-model-len: 2\nmax_model_len: 3", "max_model_len: stands there twice"),
        ("- model", "must be lines of `setting: value`"),
        ("model", "must be lines of `setting: value`"),
        ("a: b: c", "not YAML in line 1"),
        ('a: "', "not YAML in line 1"),
        ("\x00", "not YAML"),
        ("[" * 2000, "not YAML|must be"),
        ("#" * (FILE_BYTES + 1), f"has more than {FILE_BYTES} bytes"),
    ],
)
def test_a_mistake_is_one_line_with_its_place(config: Path, content: str, message: str) -> None:
    config.write_text(content)
    with pytest.raises(SettingError, match=message) as caught:
        resolve({"config": str(config)}, {})
    assert str(caught.value).startswith(f"file {config}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "# nothing yet\n", "---\n"])
def test_an_empty_file_says_nothing(config: Path, content: str) -> None:
    config.write_text(content)
    assert resolve({"config": str(config)}, {})["grpc_port"].source == "default"


def test_nothing_is_built_from_tags(config: Path, tmp_path: Path) -> None:
    config.write_text(f"served_model_name: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n")
    with pytest.raises(SettingError):
        resolve({"config": str(config)}, {})
    assert not (tmp_path / "made").exists()


def test_every_setting_can_stand_in_it(config: Path, tmp_path: Path) -> None:
    (tmp_path / "loras").mkdir()
    texts = {"lora_dir": str(tmp_path / "loras")}
    texts |= {each.name: str(each.default).lower() for each in SETTINGS if each.default is not None}
    config.write_text("".join(f"{name}: {text}\n" for name, text in texts.items()))
    found = resolve({"config": str(config)}, {})
    assert {name: found[name].source for name in texts} == {name: f"file {config}: {name}" for name in texts}
    assert all(found[each.name].value == each.default for each in SETTINGS if each.default is not None)
