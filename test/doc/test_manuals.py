"""Man pages name everything there is; the guide's policies load."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from test.support import tree
from Zorp.netfilter import site
from Zorp.runtime.options import OPTIONS
from Zorp.wire import instances_conf, zorpctl_conf
from zorpctl.cli import COMMANDS

PAGES = sorted((tree.ROOT / "man").iterdir())
GUIDE = tree.ROOT / "doc" / "guide.md"


def text_of(page: str) -> str:
    """A page as its reader would search it: one line, without markup."""
    text = (tree.ROOT / "man" / page).read_text("utf-8")
    text = re.sub(r"\\f[BIRP]", "", text.replace("\\-", "-"))
    return re.sub(r'[\s"]+', " ", text)


def has(page: str, word: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text_of(page)) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_page_is_good_roff(page):
    # when it is formatted with all warnings
    result = subprocess.run(["groff", "-ww", "-z", "-man", "-Tutf8", str(page)], capture_output=True, text=True,
                            check=False, env={**os.environ, "LC_ALL": "C.UTF-8"})
    # then there are none, and its title is its name
    assert (result.returncode, result.stderr) == (0, "")
    title, section = re.match(r"\.TH (\S+) (\d) ", page.read_text()).groups()
    assert f"{title.lower()}.{section}" == page.name


def test_every_option_of_zorp_is_documented():
    names = [f"--{option.long}" for option in OPTIONS if option.long] + [
        f"-{option.short}" for option in OPTIONS if option.short]
    assert [name for name in names if not has("zorp.8", name)] == []


def test_nothing_is_documented_that_zorp_does_not_know():
    # given every long option that the page names
    named = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", text_of("zorp.8")))
    # then there is one
    assert named - {option.long for option in OPTIONS} - {"option"} == set()


def test_every_command_of_zorpctl_is_documented():
    assert [name for name in COMMANDS if not has("zorpctl.8", name)] == []


def test_every_option_of_zorpctl_is_documented():
    # given what the help of each command shows
    shown = set()
    for name in COMMANDS:
        result = subprocess.run([sys.executable, str(tree.ROOT / "sbin/zorpctl"), name, "--help"],
                                capture_output=True, text=True, check=True)
        shown.update(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", result.stdout.partition("options:")[2]))
    # then the page has it
    assert [option for option in sorted(shown) if not has("zorpctl.8", option)] == []


def test_every_option_in_instances_conf_is_documented():
    assert [name for name in instances_conf._OPTIONS if not has("instances.conf.5", name)] == []


def test_every_key_of_zorpctl_conf_is_documented():
    keys = [*zorpctl_conf._FIELDS, *zorpctl_conf._ALIASES, zorpctl_conf._FD_LIMIT]
    assert [key for key in keys if not has("zorpctl.conf.5", key.upper())] == []


@pytest.mark.parametrize("program", ["kzorp-setup", "kzorpd", "kzorp"])
def test_every_option_of_the_packet_level_is_documented(program):
    # given what the program's help shows, of its commands too
    shown = set()
    commands = [(), ("print",)] if program == "kzorp-setup" else [()]
    for command in commands:
        result = subprocess.run([sys.executable, str(tree.ROOT / "sbin" / program), *command, "--help"],
                                capture_output=True, text=True, check=True)
        shown.update(re.findall(r"(?<![\w-])--?[a-z][\w-]*", result.stdout))
        shown.update(word for found in re.findall(r"\{([^}]*)\}", result.stdout) for word in found.split(","))
    # then the page has it
    assert [option for option in sorted(shown) if not has(f"{program}.8", option)] == []


def test_every_key_of_kzorp_yml_is_documented():
    keys = [field.name for kind in (site.Site, site.Marks, site.Bypass) for field in dataclasses.fields(kind)]
    found_out = {"accepts_marks"}                     # asked of the kernel, not of the administrator
    assert [key for key in keys if key not in found_out and not has("kzorp.yml.5", key)] == []
    # and what the page shows can be read
    page = (tree.ROOT / "man/kzorp.yml.5").read_text()
    assert len(site.read(re.search(r"\.EX\n(.*?)\.EE", page, re.DOTALL)[1]).bypass) == 2


def policies(text: str) -> dict[str, str]:
    """The blocks ```python NAME of a page."""
    return {found[1]: found[2] for found in re.finditer(r"```python (\w+)\n(.*?)```", text, re.DOTALL)}


def check(path: Path, name: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(tree.ROOT / "sbin/zorp"), "--as", name, "--policy", str(path), "--check-policy",
         "--user", str(os.getuid()), "--group", str(os.getgid())], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", policies(GUIDE.read_text("utf-8")))
def test_the_policies_of_the_guide_load(name, tmp_path):
    path = tmp_path / "policy.py"
    path.write_text(policies(GUIDE.read_text("utf-8"))[name])
    result = check(path, name)
    assert (result.returncode, result.stdout.startswith(f"{name}: Policy is usable;")) == (0, True), result.stderr
    assert "core.error" not in result.stderr


def test_a_policy_that_does_not_load_would_be_found(tmp_path):
    path = tmp_path / "policy.py"
    path.write_text(policies("```python mail\ndef mail(): Service()\n```")["mail"])
    assert check(path, "mail").returncode == 2


def test_the_example_in_the_manual_loads(tmp_path):
    # given the example of policy.py(5)
    page = (tree.ROOT / "man/policy.py.5").read_text()
    path = tmp_path / "policy.py"
    path.write_text(re.search(r"\.EX\n(.*?)\.EE", page, re.DOTALL)[1])
    assert check(path, "news").returncode == 0


def test_links_inside_the_guide_lead_somewhere():
    # given the anchors that headings get
    text = GUIDE.read_text("utf-8")
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")
               for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
    assert [link for link in re.findall(r"\(#([^)]*)\)", text) if link not in anchors] == []
    assert [link for link in re.findall(r"\]\(([^#)][^)]*)\)", text) if not (GUIDE.parent / link).exists()] == []
