"""The command line: every way in which sites have written it."""

import pytest

from Zorp.runtime.options import DEFAULT_LOG_SPEC, Mode, UsageError, help_text, parse

VERBOSITY = {
    "nothing": ([], 3),
    "attached": (["-v5"], 5),
    "separate": (["-v", "5"], 5),
    "long with equals": (["--verbose=5"], 5),
    "long separate": (["--verbose", "5"], 5),
    "bare adds one": (["-v"], 4),
    "bare before another option": (["-v", "-p", "x"], 4),
    "three letters": (["-vvv"], 6),
    "minus one means default": (["-v", "-1"], 3),
    "too high is clamped": (["-v", "99"], 10),
    "too low is clamped": (["-v", "-7"], 0),
    "the last one wins": (["-v5", "-v2"], 2),
}

REFUSED = {
    "unknown long": (["--bogus"], "zorp: Unknown option --bogus"),
    "unknown short": (["--as", "intra", "-x"], "intra: Unknown option -x"),
    "no abbreviation": (["--verb", "3"], "zorp: Unknown option --verb"),
    "value missing": (["--as", "intra", "-p"], "intra: Missing argument for -p"),
    "not a number": (["--as", "intra", "-vx"], "intra: Cannot parse integer value 'x' for -v"),
    "bad mode": (["--process-mode", "x"], "zorp: Error parsing process-mode argument"),
    "positional": (["--as", "intra", "word"], "intra: Invalid arguments.\nintra: 'word' is neither an option nor "
                   "the value of one; options begin with - or --"),
    "positional after the end": (["--as", "intra", "--", "-F"], "intra: Invalid arguments.\nintra: '-F' is neither an "
                                 "option nor the value of one; options begin with - or --"),
}

OBSOLETE = {
    "autobind": (["--autobind-ip", "1.2.3.4"], "--autobind-ip"),
    "autobind short": (["-B", "1.2.3.4"], "--autobind-ip"),
    "threadpools": (["-O"], "--threadpools"),
    "crypto": (["-E", "dynamic"], "--crypto-engine"),
    "tproxy": (["--tproxy=netfilter"], "--tproxy"),
    "process limit": (["--process-limit", "512"], "--process-limit"),
}


@pytest.mark.parametrize(("arguments", "level"), VERBOSITY.values(), ids=VERBOSITY)
def test_verbosity(arguments, level):
    assert parse(arguments).verbosity == level


@pytest.mark.parametrize(("arguments", "text"), REFUSED.values(), ids=REFUSED)
def test_refused(arguments, text):
    with pytest.raises(UsageError) as refusal:
        parse(arguments)
    assert str(refusal.value) == text


@pytest.mark.parametrize(("arguments", "name"), OBSOLETE.values(), ids=OBSOLETE)
def test_obsolete_options_are_accepted_and_named(arguments, name):
    options = parse([*arguments, "-p", "/p.py"])
    assert options.obsolete == (name,)
    assert options.policy == "/p.py"


def test_a_2_0_line():
    options = parse(["--autobind-ip", "1.2.3.4", "-v3", "-p", "/etc/zorp/policy.py", "--as", "blue"])
    assert (options.instance, options.verbosity, options.policy) == ("blue", 3, "/etc/zorp/policy.py")


def test_flags_may_be_bundled():
    options = parse(["-FN"])
    assert options.mode is Mode.FOREGROUND
    assert options.no_caps


def test_no_syslog_forces_the_foreground():
    assert parse(["-l", "--process-mode", "background"]).mode is Mode.FOREGROUND


def test_defaults():
    options = parse([])
    assert (options.instance, options.mode, options.threads, options.log_spec, options.fd_limit) == (
        "zorp", Mode.SAFE_BACKGROUND, 1000, DEFAULT_LOG_SPEC, 256_000)
    assert options.process_names == ("zorp",)
    assert options.is_master


def test_names_of_processes():
    assert parse(["--as", "a", "--num-of-processes", "2"]).process_names == ("a#0", "a#1")
    slave = parse(["--as", "a", "--slave", "a#3"])
    assert (slave.process_names, slave.is_master) == (("a#3",), False)
    assert parse(["--as", "a", "--master", "a#0"]).process_names == ("a#0",)


def test_aliases_are_called_after_the_primary():
    assert parse(["-a", "one", "-A", "two", "--also-as", "three"]).names == ["one", "two", "three"]


@pytest.mark.parametrize(("given", "most", "interval"), [
    ([], 5, 60), (["--restart-max", "99"], 30, 90), (["--restart-max", "1"], 5, 60),
    (["--restart-interval", "3"], 5, 15)])
def test_restart_limits_are_corrected_upwards(given, most, interval):
    options = parse(given)
    assert (options.restart_max, options.restart_interval) == (most, interval)
    assert bool(options.warnings) == bool(given)


def test_a_relative_policy_is_made_absolute_before_the_directory_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse(["-p", "p.py"]).policy == str(tmp_path / "p.py")


@pytest.mark.parametrize("size", ["10", "100000"])
def test_a_senseless_stack_size_is_ignored_with_a_warning(size):
    options = parse(["--stack-size", size])
    assert options.stack_kib is None
    assert "--stack-size" in options.warnings[0]


def test_check_policy_names_the_policy_or_takes_that_of_the_instance():
    assert parse(["--check-policy", "/x.py"]).policy == "/x.py"
    assert parse(["--check", "--policy", "/y.py"]).policy == "/y.py"
    assert parse(["--check"]).action == "check"


def test_every_option_with_a_text_is_in_the_help():
    assert "--deadlock-check-timeout=SEC" in help_text("all")
    assert "--threads" in help_text("thread")
    assert "--threads" not in help_text("log")
