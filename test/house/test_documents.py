"""Generated pages are what their generators would write now."""

from __future__ import annotations

import subprocess
import sys

import pytest

from doc import attributes, reference
from test.support.tree import ROOT


def test_the_page_of_attributes_is_current():
    # given the page in the repository
    text = attributes.PAGE.read_text("utf-8")
    # then it is what the tables of the program say: `python -m doc.attributes` writes it
    assert text == attributes.page()


def test_the_reference_of_the_policy_language_is_current():
    # given the page in the repository, and classes from which `python -m doc.reference` writes it
    text = reference.PAGE.read_text("utf-8")
    written = subprocess.run([sys.executable, "-c", "from doc import reference; print(reference.page(), end='')"],
                             capture_output=True, text=True, check=True, cwd=ROOT)
    assert text == written.stdout
    # then it has what policies are made of, with arguments and defaults
    assert "TransparentRouter(forced_port=0, forge_addr=0, overrideable=0, forge_port=-1)" in text
    assert "- `forge_addr`: TRUE: the server sees the client's address." in text


def test_a_class_without_a_chapter_is_found(monkeypatch):
    monkeypatch.delitem(reference.CHAPTERS, "Routers")
    with pytest.raises(ValueError, match=r"Zorp\.Router\.TransparentRouter has no chapter"):
        reference.page()
