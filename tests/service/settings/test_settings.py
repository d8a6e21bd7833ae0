"""Settings: precedence, provenance, and errors that name the source, the value and the limit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from service.cli.main import main
from service.settings.definitions import SETTINGS, engine_config, join_address
from service.settings.parsing import LEAST_MEMORY
from service.settings.resolve import Resolved, SettingError, resolve, resolve_model, unknown_variables


def test_a_flag_beats_a_variable_beats_an_alias_beats_the_default() -> None:
    environ = {"NEMOSERVE_GRPC_PORT": "2", "NIM_GRPC_API_PORT": "3"}
    assert resolve({"grpc_port": "1"}, environ)["grpc_port"] == Resolved(1, "--grpc-port")
    assert resolve({}, environ)["grpc_port"] == Resolved(2, "NEMOSERVE_GRPC_PORT")
    assert resolve({}, {"NIM_GRPC_API_PORT": "3"})["grpc_port"] == Resolved(3, "NIM_GRPC_API_PORT")
    assert resolve({}, {})["grpc_port"] == Resolved(8001, "default")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("kv_memory", "2Gi", 2 * 2**30),
        ("kv_memory", "800M", 800_000_000),
        ("kv_memory", "0.9", 0.9),
        ("kv_memory", "1.0", 1.0),
        ("kv_memory", "90%", 0.9),
        ("kv_memory", ".25", 0.25),
        ("served_model_name", "a, b", ("a", "b")),
        ("log_level", "TRACE", "debug"),
        ("log_level", "CRITICAL", "error"),
        ("profile", "default", None),
        ("log_json", "yes", True),
        ("prefix_caching", "0", False),
        ("log_level", "INFO", "info"),
    ],
)
def test_values_are_understood(name: str, text: str, value: object) -> None:
    assert resolve({name: text}, {})[name].value == value


@pytest.mark.parametrize(
    ("name", "text", "rule"),
    [
        ("grpc_port", "70000", "between 0 and 65535"),
        ("max_batch_size", "0", "between 1 and 4096"),
        ("max_draft_tokens", "65", "between 0 and 64"),
        ("max_model_len", "many", "a whole number"),
        ("kv_memory", "-1", "a number of bytes"),
        ("kv_memory", "0", "a number of bytes"),
        ("kv_memory", "90", f"at least {LEAST_MEMORY}, or a share of what is left, such as 0.9"),
        ("kv_memory", "1.1", "a share above 0 and at most 1.0"),
        ("kv_memory", "0.0", "a share above 0 and at most 1.0"),
        ("kv_memory", "120%", "a share above 0 and at most 1.0"),
        ("kv_memory", "nan", "a number of bytes"),
        ("served_model_name", "a,,b", "a name, or several separated by commas"),
        ("served_model_name", "a,a", "not have a name twice"),
        ("config", "/no/such/file", "a file that is there"),
        ("drain_timeout", "nan", "between 0 and 86400"),
        ("precision", "fp4", "one of auto, bf16, fp8, fp8-weight-only, int8, int4"),
        ("precision", "fp32", "one of auto, bf16, fp8"),
        ("kv_precision", "int8", "one of auto, bf16, fp8"),
        ("dtype", "fp16", "one of auto, bf16, fp32"),
        ("log_json", "maybe", "true or false"),
        ("host", "", "not be empty"),
        ("lora_dir", "/no/such/folder", "a folder that is there"),
        ("lora_dir", "", "not be empty"),
        ("lora_refresh", "-1", "between 0 and 86400"),
        ("max_loras", "0", "between 1 and 4096"),
        ("max_cpu_loras", "0", "between 1 and 65536"),
        ("lookahead", "2", "between 0 and 1"),
        ("max_lora_rank", "0", "between 1 and 4096"),
    ],
)
def test_a_wrong_value_names_its_source_and_the_limit(name: str, text: str, rule: str) -> None:
    variable = f"NEMOSERVE_{name.upper()}"
    with pytest.raises(SettingError, match=rf"{variable}: '{text}' must .*{rule}|{variable}: '{text}' must {rule}"):
        resolve({}, {variable: text})


def test_an_address_beyond_loopback_must_be_asked_for_twice() -> None:
    with pytest.raises(SettingError, match="allow-anonymous"):
        resolve({"host": "0.0.0.0"}, {})
    assert resolve({"host": "0.0.0.0", "allow_anonymous": "true"}, {})["host"].value == "0.0.0.0"


def test_who_asks_for_keys_or_certificates_may_listen_anywhere(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    path = str(file)
    tls = {"tls_cert": path, "tls_key": path}
    for flags in (
        {"api_keys_file": path},
        {**tls, "tls_client_ca": path},
        {"tls_mode": "mtls", **tls, "tls_client_ca": path},
    ):
        assert resolve({"host": "0.0.0.0", **flags}, {})["host"].value == "0.0.0.0"
    for flags in (tls, {**tls, "tls_client_ca": path, "tls_mode": "tls"}, {**tls, "tls_mode": "disabled"}):
        with pytest.raises(SettingError, match=r"^--host: 0\.0\.0\.0 is reachable by others and requests are not auth"):
            resolve({"host": "0.0.0.0", **flags}, {})


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"NEMOSERVE_TLS_CERT": "FILE"}, "NEMOSERVE_TLS_CERT: FILE needs --tls-key too"),
        ({"NIM_SSL_KEY_PATH": "FILE"}, "NIM_SSL_KEY_PATH: FILE needs --tls-cert too"),
        ({"NEMOSERVE_TLS_CLIENT_CA": "FILE"}, "NEMOSERVE_TLS_CLIENT_CA: FILE needs --tls-cert too"),
        ({"NIM_SSL_MODE": "TLS"}, "NIM_SSL_MODE: tls needs --tls-cert too"),
        (
            {"NIM_SSL_MODE": "MTLS", "NIM_SSL_CERTS_PATH": "FILE", "NIM_SSL_KEY_PATH": "FILE"},
            "NIM_SSL_MODE: mtls needs --tls-client-ca too",
        ),
        ({"NIM_SSL_MODE": "on"}, "NIM_SSL_MODE: 'on' must be one of auto, disabled, tls, mtls"),
        ({"NEMOSERVE_API_KEYS_FILE": "/no/such/file"}, "NEMOSERVE_API_KEYS_FILE: '/no/such/file' must be a file that"),
    ],
)
def test_half_of_what_encryption_needs_is_a_mistake(tmp_path: Path, given: dict[str, str], complaint: str) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SettingError, match="^" + re.escape(complaint.replace("FILE ", f"{file} "))):
        resolve({}, {name: str(file) if value == "FILE" else value for name, value in given.items()})


def test_a_profile_decides_what_nothing_else_does() -> None:
    profile = "mistral-nemo-12b-instruct/a100-80gb-fp8-weight-only-kvfp8-tp1"
    source = f"profile {profile}"
    found = resolve({"device": "cpu"}, {"NIM_MODEL_PROFILE": profile, "NEMOSERVE_KV_PRECISION": "auto"})
    assert found["profile"] == Resolved(profile, "NIM_MODEL_PROFILE")
    assert found["model"] == Resolved("mistral-nemo-12b-instruct", source)
    assert found["precision"] == Resolved("fp8-weight-only", source)
    assert found["device"] == Resolved("cpu", "--device")
    assert found["kv_precision"] == Resolved("auto", "NEMOSERVE_KV_PRECISION")
    assert found["dtype"] == Resolved("auto", "default")
    assert found["tensor_parallel_size"] == Resolved(1, source)
    assert resolve({"profile": "m/h100-fp8-tp8"}, {})["tensor_parallel_size"].value == 8


@pytest.mark.parametrize(
    "profile",
    [
        "h100-fp8-tp1",
        "m/h100-fp8-tp0",
        "m/h100-fp8-tp",
        "m/h100-fp4-tp1",
        "m/mi300x-fp8-tp1",
        "m/h100-tp1",
        "a/b/h100-fp8-tp1",
        "m/h100-fp8-tp1\n",
    ],
)
def test_what_is_no_profile_is_refused(profile: str) -> None:
    with pytest.raises(SettingError, match=r"--profile: .* must be MODEL/DEVICE-PRECISION-tpN"):
        resolve({"profile": profile}, {})


@pytest.mark.parametrize("name", ["precision", "kv_precision"])
def test_what_is_kept_in_bf16_is_not_computed_in_fp32(name: str) -> None:
    variable = f"NEMOSERVE_{name.upper()}"
    with pytest.raises(SettingError, match=f"{variable}: bf16 does not go with fp32 of --dtype"):
        resolve({"dtype": "fp32"}, {variable: "bf16"})
    for dtype, kept in (("fp32", "fp8"), ("fp32", "auto"), ("bf16", "bf16"), ("auto", "bf16")):
        assert resolve({"dtype": dtype, name: kept}, {})[name].value == kept


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"http_port": "8001"}, "--http-port: 8001 is the port of gRPC too; one of the two must move"),
        ({"grpc_port": "8000"}, "--grpc-port: 8000 is the port of HTTP too; one of the two must move"),
    ],
)
def test_two_ports_are_not_one(flags: dict[str, str], message: str) -> None:
    with pytest.raises(SettingError, match=f"^{message}$"):
        resolve(flags, {})
    assert resolve({"http_port": "0", "grpc_port": "0"}, {})["http_port"].value == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"max_batch_size": "9", "max_batch_tokens": "8"},
            "--max-batch-tokens: 8 must be at least the 9 of max_batch_size",
        ),
    ],
)
def test_a_step_has_a_token_for_every_running_request(flags: dict[str, str], message: str) -> None:
    with pytest.raises(SettingError, match=f"^{message}: a token for each running request$"):
        resolve(flags, {})
    assert resolve({"max_batch_size": "8", "max_batch_tokens": "8"}, {})["max_batch_size"].value == 8


def test_the_names_of_nim_for_adapters_are_understood(tmp_path: Path) -> None:
    names = {
        "NIM_PEFT_SOURCE": str(tmp_path),
        "NIM_PEFT_REFRESH_INTERVAL": "30",
        "NIM_MAX_GPU_LORAS": "3",
        "NIM_MAX_CPU_LORAS": "9",
        "NIM_MAX_LORA_RANK": "64",
    }
    settings = resolve({}, names)
    understood = ("lora_dir", "lora_refresh", "max_loras", "max_cpu_loras", "max_lora_rank")
    assert [settings[name].value for name in understood] == [str(tmp_path), 30.0, 3, 9, 64]
    assert unknown_variables(names) == {}


@pytest.mark.parametrize(
    ("variable", "text", "name", "value"),
    [
        ("NIM_MODEL_PATH", "hf://org/name", "model", "hf://org/name"),
        ("NIM_SERVED_MODEL_NAME", "mine,other", "served_model_name", ("mine", "other")),
        ("NIM_MODEL_PROFILE", "default", "profile", None),
        ("NIM_GRPC_API_PORT", "50051", "grpc_port", 50051),
        ("NIM_SERVER_PORT", "9000", "http_port", 9000),
        ("NIM_MAX_MODEL_LEN", "4096", "max_model_len", 4096),
        ("NIM_KVCACHE_PERCENT", "0.9", "kv_memory", 0.9),
        ("NIM_ENABLE_KV_CACHE_REUSE", "0", "prefix_caching", False),
        ("NIM_TENSOR_PARALLEL_SIZE", "2", "tensor_parallel_size", 2),
        ("NIM_LOG_LEVEL", "WARNING", "log_level", "warning"),
        ("NIM_JSONL_LOGGING", "1", "log_json", True),
    ],
)
def test_the_names_of_nim_mean_the_same(variable: str, text: str, name: str, value: object) -> None:
    assert resolve({}, {variable: text})[name] == Resolved(value, variable)
    assert unknown_variables([variable]) == {}


def test_an_unknown_variable_is_told_with_the_one_that_is_near() -> None:
    environ = ["NIM_GRPC_PORT", "NEMOSERVE_MAX_MODEL_LENGTH", "NIM_SOMETHING_ELSE", "HOME", "NIM_CACHE_PATH"]
    assert unknown_variables(environ) == {
        "NIM_GRPC_PORT": "NIM_GRPC_API_PORT",
        "NEMOSERVE_MAX_MODEL_LENGTH": "NEMOSERVE_MAX_MODEL_LEN",
        "NIM_SOMETHING_ELSE": None,
    }


def test_a_share_of_the_memory_reaches_the_engine() -> None:
    values = {name: each.value for name, each in resolve({"kv_memory": "50%"}, {}).items()}
    config = engine_config(Path("m"), values)
    assert (config.kv_memory_share, config.kv_memory_bytes) == (0.5, None)


def test_the_model_alone_is_found_whatever_else_is_wrong() -> None:
    environ = {"NEMOSERVE_HOST": "0.0.0.0", "NEMOSERVE_GRPC_PORT": "x"}
    assert resolve_model({"model": None, "profile": "m/h100-fp8-tp1"}, environ) == "m"
    assert resolve_model({}, {"NIM_MODEL_PATH": "hf://org/name"}) == "hf://org/name"


def test_a_folder_is_taken_from_where_the_server_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve({"lora_dir": "here"}, {})["lora_dir"].value == str(tmp_path / "here")


def test_the_name_of_nim_for_ranks_is_understood_and_adapters_are_refused_beside_it(tmp_path: Path) -> None:
    ranks = {"NIM_TENSOR_PARALLEL_SIZE": "4"}
    settings = resolve({}, ranks)
    assert settings["tensor_parallel_size"] == Resolved(4, "NIM_TENSOR_PARALLEL_SIZE")
    values = {name: each.value for name, each in settings.items()}
    assert engine_config(Path("-"), values).tensor_parallel_size == 4
    assert unknown_variables(ranks) == {}
    with pytest.raises(SettingError, match=r"^NIM_TENSOR_PARALLEL_SIZE: 4 does not go with the adapters of --lora-dir"):
        resolve({"lora_dir": str(tmp_path)}, ranks)
    assert resolve({"lora_dir": str(tmp_path), "tensor_parallel_size": "1"}, ranks)["lora_dir"].source == "--lora-dir"


def test_misspelt_variables_are_named() -> None:
    environ = {"NEMOSERVE_GPRC_PORT": "1", "NIM_MAX_MODEL_LEN": "9", "NEMOSERVE_CACHE": "/x", "PATH": "/bin"}
    assert unknown_variables(environ) == {"NEMOSERVE_GPRC_PORT": "NEMOSERVE_GRPC_PORT"}


def test_every_setting_is_an_option_with_help() -> None:
    text = CliRunner().invoke(main, ["serve", "--help"]).output
    assert [setting.flag for setting in SETTINGS if setting.flag not in text and setting.name != "model"] == []


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["serve", "--grpc-port", "x"], 2),
        (["pull", "no-such-model"], 1),
        (["serve", "--no-such-flag"], 2),
        (["--version"], 0),
    ],
)
def test_exit_codes(arguments: list[str], code: int) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == code
    assert "Traceback" not in result.output


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "localhost", "::1", "[::1]"])
def test_loopback_needs_no_permission(host: str) -> None:
    assert resolve({"host": host}, {})["host"].value == host


@pytest.mark.parametrize("host", ["::", "10.0.0.1", "localhost.example.org", "127.0.0.1.example.org"])
def test_anything_else_does(host: str) -> None:
    with pytest.raises(SettingError, match="allow-anonymous"):
        resolve({"host": host}, {})


@pytest.mark.parametrize(
    ("host", "address"), [("127.0.0.1", "127.0.0.1:1"), ("::1", "[::1]:1"), ("[::1]", "[::1]:1"), ("a.b", "a.b:1")]
)
def test_an_ipv6_address_gets_its_brackets(host: str, address: str) -> None:
    assert join_address(host, 1) == address


def test_the_model_is_an_argument_and_named_so() -> None:
    assert resolve({"model": "x"}, {})["model"].source == "MODEL"
