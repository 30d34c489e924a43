"""Options that a policy sets although nobody reads them: a near miss stops the load, other names are named."""

import pytest

POLICY = """
from Zorp.Config import config
%s

def gateway():
    service("a")
"""


@pytest.fixture(autouse=True)
def own_options():
    """Take away what a policy of a test has set."""
    from Zorp.Config import config
    saved = {branch: dict(vars(branch)) for branch in (config.options, config.audit, config.blob, config.dirs)}
    yield
    for branch, values in saved.items():
        branch.__dict__.clear()
        branch.__dict__.update(values)


@pytest.mark.parametrize(("line", "meant"), [
    ("config.options.max_connection_per_client = 2", "config.options.max_connections_per_client"),
    ("config.options.lagnuage = 'hu'", "config.options.language"),
    ("config.blob.temp_directroy = '/tmp'", "config.blob.temp_directory"),
    ("config.audit.compres_level = 9", "config.audit.compress_level"),
    ("config.dirs.sysconfdirs = '/etc'", "config.dirs.sysconfdir"),
])
def test_a_near_miss_is_a_load_error_with_its_place(dispatching, line, meant):
    # given a typing mistake in the name of an option; when the policy is loaded
    with pytest.raises(ValueError, match="No such option") as refused:
        dispatching(POLICY % line)
    # then the error has the place and the name that was meant
    assert f"write {meant}" in str(refused.value)
    assert refused.value.place.startswith("policy.py:")


@pytest.mark.parametrize("line", [
    "config.options.timeout_server_connect = 10 ** 30", "config.options.timeout_server_connect = 0",
    "config.options.max_connections_per_client = '5'", "config.options.max_udp_sessions = None",
])
def test_a_number_that_nobody_could_use_is_a_load_error(dispatching, line):
    with pytest.raises(ValueError, match=r"Invalid \w+ of config.options; .*; give a whole number from"):
        dispatching(POLICY % line)


@pytest.mark.parametrize("line", ["config.options.site_name = 'hq'", "config.options.ids = 1", "config.dirs.x = 1"])
def test_values_of_the_site_are_kept_and_named_in_the_log(dispatching, line):
    running = dispatching(POLICY % line)
    texts = running.logged.texts("core.policy")
    name = line.partition(" ")[0]
    assert [text for text in texts if f"No such option, the value is kept for the policy only; option='{name}'" in text]


def test_known_options_and_containers_of_the_site_are_silent(dispatching):
    running = dispatching(POLICY % "config.addConfigContainer('site')\nconfig.site.language2 = 1\n"
                                   "config.options.language = 'hu'\nconfig.options.max_udp_sessions = 5")
    assert not [text for text in running.logged.texts("core.policy") if "No such option" in text]
