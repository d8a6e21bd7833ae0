"""The keys file: what it may hold, what is refused and in which words, and how a running server takes a new one."""

from __future__ import annotations

import hashlib
import hmac
import logging
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from click.testing import CliRunner

from service.caller import TenantLimits
from service.cli.main import main
from service.security.access import Access
from service.security.errors import SecurityError
from service.security.keys import KeysFile, Tenant, entry_of, new_key, parse_keys

KEY, OTHER = "nms-0123456789abcdef", "nms-fedcba9876543210"
DIGEST = hashlib.sha256(KEY.encode()).hexdigest()


def text(*lines: str) -> bytes:
    return "\n".join(lines).encode()


def test_an_entry_says_who_has_a_key_and_how_much_is_theirs() -> None:
    keys = parse_keys(
        text(
            "- name: search",
            f"  sha256: {DIGEST.upper()}",
            "  weight: 2.5",
            "  max_running: 8",
            "  max_queued: 64",
            "  tokens_per_minute: 600000",
            "  best_priority: -2",
            "- {name: operations, admin: true, key: nms-fedcba9876543210}",
        )
    )
    search, operations = keys.of_key(KEY), keys.of_key(OTHER)
    assert search == Tenant(
        name="search",
        digests=(bytes.fromhex(DIGEST),),
        limits=TenantLimits(weight=2.5, max_running=8, max_queued=64, tokens_per_minute=600_000, best_priority=-2),
    )
    assert operations is not None
    assert (operations.name, operations.admin, operations.limits) == ("operations", True, TenantLimits())
    assert keys.of_key(KEY + "0") is keys.of_key(KEY.upper()) is keys.of_key("") is None


def test_better_classes_than_normal_are_for_admins_and_those_of_whom_it_is_said(tmp_path: Path) -> None:
    (tmp_path / "keys.yaml").write_bytes(
        text("- {name: a, key: nms-0123456789abcdef}", "- {name: ops, admin: true, key: nms-fedcba9876543210}")
    )
    keyed = Access(keys=KeysFile(tmp_path / "keys.yaml"))
    found = {name: keyed.limits(name).best_priority for name in ("a", "ops", "gone")}
    assert found == {"a": 0, "ops": None, "gone": 0}
    assert Access(client_certificates=True).limits("a").best_priority == 0
    assert Access(trusted=False).limits("").best_priority is None


def test_one_key_replaces_another_while_both_are_good() -> None:
    keys = parse_keys(
        text("- name: a", "  sha256:", f"  - {DIGEST}", f"  - {hashlib.sha256(OTHER.encode()).hexdigest()}")
    )
    assert keys.of_key(KEY) is keys.of_key(OTHER) is not None


def test_a_certificate_stands_for_a_key_only_where_the_file_says_so() -> None:
    keys = parse_keys(text("- {name: billing, certificate: true}", f"- {{name: search, sha256: {DIGEST}}}"))
    billing = keys.of_certificate("billing")
    assert billing is not None
    assert billing.name == "billing"
    assert keys.of_certificate("search") is keys.of_certificate("nobody") is None


def test_keys_are_compared_in_constant_time_with_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def compare_digest(one: bytes, other: bytes) -> bool:
        compared.append(other)
        return hmac.compare_digest(one, other)

    entries = [f"- {{name: t{i}, sha256: {hashlib.sha256(bytes([i])).hexdigest()}}}" for i in range(5)]
    keys = parse_keys(text(*entries, f"- {{name: last, sha256: {DIGEST}}}"))
    monkeypatch.setattr("service.security.keys.hmac", SimpleNamespace(compare_digest=compare_digest))
    for key in (KEY, "wrong", "\x00"):
        compared.clear()
        keys.of_key(key)
        assert compared == [hashlib.sha256(key.encode()).digest()] * 6


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        ([""], "must be a list"),
        (["[]"], "must be a list"),
        (["name: a"], "must be a list"),
        (["- a"], "entry 1 must have a name"),
        (["- {sha256: ab}"], "entry 1 must have a name"),
        (["- {name: [a], key: nms-0123456789abcdef}"], "entry 1 must have a name"),
        (["- {name: ' a', key: nms-0123456789abcdef}"], "' a' is no name"),
        (['- {name: "a\\nb", key: nms-0123456789abcdef}'], r"'a\\nb' is no name"),
        (["- {name: a}"], "a: needs sha256, key or certificate"),
        (["- {name: a, certificate: false}"], "a: needs sha256, key or certificate"),
        (["- {name: a, sha: ab}"], "a: knows only name, sha256, key, certificate, admin, weight"),
        (["- {name: a, sha256: ab}"], "a: sha256 must have 64 hexadecimal digits"),
        (["- {name: a, sha256: {b: c}}"], "a: sha256 must be text or a list of texts"),
        (["- {name: a, key: short}"], "a: key must have 16 to 512 visible ASCII characters"),
        (["- {name: a, key: 'nms-0123456789 abcdef'}"], "a: key must have 16 to 512 visible"),
        (["- {name: a, key: nms-0123456789abcdef, admin: maybe}"], "a: admin must be true or false"),
        (["- {name: a, key: nms-0123456789abcdef, max_running: 0}"], "a: max_running must be a whole number from 1"),
        (["- {name: a, key: nms-0123456789abcdef, best_priority: low}"], "a: best_priority must be a whole number"),
        (["- {name: a, key: nms-0123456789abcdef, max_queued: -1}"], "a: max_queued must be a whole number from 1"),
        (["- {name: a, key: nms-0123456789abcdef, tokens_per_minute: .inf}"], "a: tokens_per_minute must be a whole"),
        (["- {name: a, key: nms-0123456789abcdef, weight: nan}"], "a: weight must be a number above 0"),
        (["- {name: a, key: nms-0123456789abcdef, weight: 0.0}"], "a: weight must be a number above 0"),
        (["- {name: a, key: nms-0123456789abcdef}", "- {name: a, key: nms-fedcba9876543210}"], "two entries for a"),
        (["- {name: a, key: nms-0123456789abcdef}", f"- {{name: b, sha256: {DIGEST}}}"], "the same key"),
        (["- name: a", "  key: nms-0123456789abcdef", " bad: x"], "no YAML in line 3"),
        (
            ["- {name: a, key: !!python/object/apply:os.system [nms-0123456789abcdef]}", "- 1"],
            "entry 2 must have a name",
        ),
        (["\x00"], "no YAML"),
        (["[" * 500], "no YAML"),
    ],
)
def test_what_is_wrong_is_named_and_no_key_is_quoted(lines: list[str], complaint: str) -> None:
    with pytest.raises(SecurityError, match=complaint) as caught:
        parse_keys(text(*lines))
    assert "0123456789" not in str(caught.value)
    assert "fedcba" not in str(caught.value)


def test_a_missing_or_huge_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    with pytest.raises(SecurityError, match=f"^{path}: No such file"):
        KeysFile(path)
    path.write_bytes(b"#" * (2**20 + 1))
    with pytest.raises(SecurityError, match=f"^{path}: must have at most 1048576 bytes"):
        KeysFile(path)


def test_a_changed_file_counts_at_once_and_a_broken_one_is_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text(f"- {{name: a, key: {KEY}, max_running: 3}}\n")
    file = KeysFile(path)
    assert (file.limits("a").max_running, file.limits("b")) == (3, TenantLimits(best_priority=0))
    path.write_text(f"- {{name: longer, key: {OTHER}}}\n")
    file.refresh()
    assert (file.keys.of_key(KEY), file.keys.of_key(OTHER) is not None) == (None, True)
    for broken in ("- {name: broken, key: nms-secret-of-mine", "", None):
        caplog.clear()
        path.unlink() if broken is None else path.write_text(broken)
        with caplog.at_level(logging.INFO):
            for _ in range(3):
                file.refresh()
        [record] = caplog.records
        assert (record.levelname, record.getMessage()) == ("ERROR", "keys stay as they were")
        assert "nms-" not in caplog.text + str(vars(record))
        assert file.keys.of_key(OTHER) is not None
    path.write_text(f"- {{name: a, key: {KEY}}}\n")
    file.refresh()
    assert file.keys.of_key(KEY) is not None


def test_new_keys_are_long_and_never_the_same() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(key.startswith("nms-") and len(key) == 4 + 43 for key in keys)


def test_the_command_makes_a_key_and_the_entry_for_it() -> None:
    result = CliRunner().invoke(main, ["keys", "new", "search team", "--admin"])
    key, entry = result.output.split("\n\n")
    tenant = parse_keys(entry.encode()).of_key(key)
    assert tenant is not None
    assert (tenant.name, tenant.admin) == ("search team", True)
    assert key not in entry
    assert yaml.safe_load(entry)[0]["name"] == "search team"


def test_the_command_adds_to_a_file_what_goes_with_it(tmp_path: Path) -> None:
    path, run = tmp_path / "keys.yaml", CliRunner().invoke
    first = run(main, ["keys", "new", "a", "--file", str(path)]).output.strip()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("# ours\n" + path.read_text().rstrip())
    path.chmod(0o640)
    second = run(main, ["keys", "new", "b", "--file", str(path), "--admin"]).output.strip()
    keys = KeysFile(path).keys
    assert [keys.of_key(key).name for key in (first, second)] == ["a", "b"]  # type: ignore[union-attr]
    assert path.read_text().startswith("# ours\n")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    before = path.read_text()
    again = run(main, ["keys", "new", "b", "--file", str(path)])
    assert (again.exit_code, path.read_text(), [*tmp_path.iterdir()]) == (1, before, [path])
    assert "two entries for b" in again.output


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 129, '"'])
def test_what_is_no_name_gets_no_key(name: str) -> None:
    with pytest.raises(SecurityError, match="is no name"):
        entry_of(name, KEY, admin=False)
