"""What a host is asked before packet rules are loaded, where the kernel's files come and go."""

from __future__ import annotations

from Zorp.netfilter import preflight
from Zorp.netfilter.site import Site


def test_an_interface_that_goes_while_the_host_is_looked_at_is_no_obstacle(monkeypatch, tmp_path):
    # given two interfaces with the strict filter, one that is not strict, and one whose file cannot be read any more
    for name, value in (("all", "1"), ("ve1", "1"), ("ve2.5", "1"), ("ve3", "0"), ("ve4", None)):
        place = tmp_path / "sys/net/ipv4/conf" / name / "rp_filter"
        place.parent.mkdir(parents=True)
        if value is None:
            place.mkdir()
        else:
            place.write_text(value + "\n")
    monkeypatch.setattr(preflight, "_PROC", tmp_path)
    # then the strict ones are named
    finding, = preflight._routing(Site())
    assert finding.text.endswith("strict interfaces: ve1 ve2.5")
