"""kzorp.yml: defaults, what can be said, and what is refused by name."""

import contextlib
import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from Zorp.netfilter.site import Bypass, Marks, Site, SiteError, read


def test_nothing_means_the_defaults():
    assert read("") == Site()
    assert read("# only a comment\n") == Site()


def test_everything_can_be_said():
    site = read("""
        backend: legacy-restore
        families: [4]
        marks: {divert: 0x10, own: 0x20, connection_shift: 12}
        default_deny: false
        bypass:
          - iface: mgmt0
          - {proto: tcp, dst: 192.0.2.1/32, dst_port: 22}
          - {proto: 17, src: 10.0.0.0/8, dst_port: [33434, 33534]}
        """)
    assert (site.backend, site.families, site.default_deny) == ("legacy-restore", (4,), False)
    assert site.marks == Marks(divert=0x10, own=0x20, connection_shift=12)
    assert site.marks.connection_mask == 0xFFFFF000
    assert site.bypass == (Bypass(iface="mgmt0"), Bypass(proto=6, dst="192.0.2.1/32", dst_port=(22, 22)),
                           Bypass(proto=17, src="10.0.0.0/8", dst_port=(33434, 33534)))
    assert [entry.family for entry in site.bypass] == [None, 4, 4]


REFUSED = {
    "misspelt key": ("defualt_deny: true", "unknown key 'defualt_deny'"),
    "not a mapping": ("- a", "keys with values"),
    "not YAML": ("a: [", "not YAML"),
    "kind": ("default_deny: maybe", "default_deny: true or false"),
    "choice": ("backend: bpf", "backend: one of auto"),
    "two bits": ("marks: {divert: 3}", "divert: a number with one bit"),
    "equal marks": ("marks: {divert: 1, own: 1}", "different bits"),
    "main table": ("routing_table: 254", "routing_table: a number from 1 to 252"),
    "bypass of all": ("bypass: [{}]", "without a condition"),
    "bypass port": ("bypass: [{dst_port: 22}]", "dst_port needs proto"),
    "bypass net": ("bypass: [{src: 10.0.0.1/8}]", "src: address/bits"),
    "bypass iface": ("bypass: [{iface: eth+}]", "iface: an interface name"),
    "bypass families": ("bypass: [{src: 10.0.0.0/8, dst: '::/0'}]", "different families"),
    "bypass ports": ("bypass: [{proto: tcp, dst_port: [2, 1]}]", "the lower port"),
}


@pytest.mark.parametrize(("text", "complaint"), REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_is_named(text, complaint):
    with pytest.raises(SiteError) as refused:
        read(text)
    assert complaint in str(refused.value)


PLACES = {
    "a key": ("mode: compiled\n\ndefualt_deny: true\n", "/etc/zorp/kzorp.yml:3: unknown key 'defualt_deny'; known are"),
    "a value": ("\nmode: queue\n", "/etc/zorp/kzorp.yml:2: mode: one of compiled"),
    "below a key": ("\n\nbypass:\n  - {iface: eth+}\n", "/etc/zorp/kzorp.yml:3: bypass"),
    "a fault of the syntax": ("mode: compiled\nbypass: [\n", "/etc/zorp/kzorp.yml:3: not YAML: "),
}


@pytest.mark.parametrize(("text", "complaint"), PLACES.values(), ids=PLACES)
def test_what_is_wrong_is_named_with_its_place(text, complaint):
    with pytest.raises(SiteError) as refused:
        read(text, "/etc/zorp/kzorp.yml")
    assert str(refused.value).startswith(complaint)
    assert "\n" not in str(refused.value)


@given(st.text(alphabet="abmrks:{}[],- \n0x1'\"&*!", max_size=60))
def test_any_text_is_read_or_refused(text):
    with contextlib.suppress(SiteError):
        read(text)


# fifteen kinds of value; each key refuses all but its own kinds
WRONG = ["[[4, 6]]", "{a: 1}", "2026-13-45", "!!int ''", "!!binary 'x'", "!!timestamp 'x'", "!!bool 'x'",
         "!!python/none x", "!!float 'x'", "-1", ".nan", ".inf", "0x" + "f" * 5000, '"a\\0b"', '"\\ud800"']


@pytest.mark.parametrize("key", [
    field.name for field in dataclasses.fields(Site) if field.name != "accepts_marks"])
@pytest.mark.parametrize("value", WRONG, ids=range(len(WRONG)))
def test_a_wrong_value_of_any_key_is_refused_by_name(key, value):
    with pytest.raises(SiteError, match=rf"^kzorp\.yml:2: .*{key}") as refused:
        read(f"\n{key}: {value}\n")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("key", ["iface", "proto", "src", "dst", "dst_port"])
@pytest.mark.parametrize("value", [*WRONG, "true", "1.5", "fe80::1%lo"], ids=range(len(WRONG) + 3))
def test_a_wrong_value_of_any_key_of_a_bypass_is_refused_by_name(key, value):
    with pytest.raises(SiteError, match=rf"^kzorp\.yml:1: .*{key}|^kzorp\.yml:1: bypass: not YAML"):
        read(f"bypass: [{{{key}: {value}}}]")


@pytest.mark.parametrize("text", ["? [a]\n: b", "? {a: b}\n: c", "1: 2", "? !!int ''\n: 1", "null: 1", "&a [*a]",
                                  "families: &a [*a]", "<<: 1", "a\0b",
                                  "mode: *nobody", "families: [4.0, true]", "state_dir: here"])
def test_what_is_no_setting_is_refused(text):
    with pytest.raises(SiteError, match=r"^kzorp\.yml"):
        read(text)
