"""What is shipped as an example works as shipped."""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys

import pytest

from Zorp.wire import instances_conf, zorpctl_conf

ROOT = pathlib.Path(__file__).resolve().parents[2]
ETC = ROOT / "etc/zorp"


@pytest.mark.parametrize("instance", ["mail", "news"])
def test_the_example_policy_loads(instance, tmp_path):
    # given the example policy and its zones in a directory of their own
    for name in ("policy.py", "zones.py"):
        shutil.copy(ETC / name, tmp_path)
    # when it is checked as the README says
    result = subprocess.run([sys.executable, str(ROOT / "sbin/zorp"), "--as", instance, "--policy",
                             str(tmp_path / "policy.py"), "--check-policy", "--no-syslog"],
                            capture_output=True, text=True, check=False, timeout=30)
    # then it is usable
    assert result.returncode == 0, result.stderr
    assert "Policy is usable" in result.stdout


def test_the_example_instances_are_lines_that_zorpctl_understands():
    text = (ETC / "instances.conf").read_text()
    lines = "\n".join(line.removeprefix("# ") for line in text.splitlines() if "--policy" in line)
    instances, problems = instances_conf.parse(lines, zorpctl_conf.parse((ETC / "zorpctl.conf").read_text()))
    assert [instance.name for instance in instances] == ["mail", "news"]
    assert problems == []


def test_the_demo_shows_a_mail_that_passes_and_one_that_does_not():
    result = subprocess.run([sys.executable, str(ROOT / "doc/demo/demo.py")], capture_output=True, text=True,
                            check=False, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "refused by the firewall: 554 Relaying denied." in result.stdout
    assert "one mail delivered, one refused" in result.stdout
