"""Generated pages are what their generators would write now."""

from __future__ import annotations

from doc import attributes


def test_the_page_of_attributes_is_current():
    # given the page in the repository
    text = attributes.PAGE.read_text("utf-8")
    # then it is what the tables of the program say: `python -m doc.attributes` writes it
    assert text == attributes.page()
