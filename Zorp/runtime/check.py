"""Load a policy as an instance would, without listening: zorp --check-policy, --describe, --explain.

The file and the functions of the instance run as at a start, in a child that has let go of every
privilege (Zorp.runtime.isolation); nothing is bound, no pid file is touched.  The check then looks
for addresses that exclude each other (Zorp.runtime.binding) and runs config() of every proxy class
with a stand-in for a session (Zorp.runtime.rehearsal).  Standard output gets what was found: one
line, for --describe one line of JSON with what the instance wants from the packet filter, for
--explain what Zorp.runtime.explain writes.  Standard error gets what the log says of the policy up
to level 3, whatever the instance's own log options are: there are no sessions here that could be
told of; and what the policy prints.  Exit status 0: usable; 2: not; 1: the check itself could not
be made.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable

from Zorp import Config, Globals, Log
from Zorp.Exceptions import PolicyError
from Zorp.Log import log
from Zorp.rules.description import DescriptionError, to_json
from Zorp.rules.description import check as verify
from Zorp.runtime import binding, isolation, privileges
from Zorp.runtime.describe import describe
from Zorp.runtime.explain import QuestionError, read_question
from Zorp.runtime.explain import explain as answer_to
from Zorp.runtime.explain import text as text_of
from Zorp.runtime.loader import Loader, LoadFailed
from Zorp.runtime.logsetup import LogSetup
from Zorp.runtime.options import Mode, Options
from Zorp.runtime.rehearsal import Rehearsal
from Zorp.runtime.worker import EXIT_OK, EXIT_POLICY, EXIT_SETUP

_VERBOSITY = 3                   # complaints and warnings

Result = tuple[int, str]         # exit status, text for standard output


def run(options: Options) -> int:
    """Check the policy of these options; return the exit status."""
    return _in_child(options, _check)


def print_description(options: Options) -> int:
    """Print what the instance of these options wants from the packet filter, as JSON; return the exit status."""
    return _in_child(options, _describe)


def _in_child(options: Options, work: Callable[[Options, Loader], Result]) -> int:
    """Load the policy in a child and print what work() finds there; return the exit status."""
    def load_and_work() -> Result:
        loader = _load_unprivileged(options)
        return (loader, "") if isinstance(loader, int) else work(options, loader)

    try:
        status, text = isolation.in_child(load_and_work)
    except isolation.NoReport as problem:
        print(f"{options.instance}: Policy cannot be used, its process ended before the work was done, does it call "
              f"os._exit() or close descriptors; policy_file='{options.policy}', error='the process {problem}'",
              file=sys.stderr)
        return EXIT_POLICY
    try:
        print(text, end="\n" if text else "", flush=True)
    except BrokenPipeError:                          # `zorp --describe | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


def explain(options: Options) -> int:
    """Print what the policy does with the connection of --explain; return the exit status."""
    try:
        read_question(options.question)
    except QuestionError as problem:
        print(f"{options.instance}: {problem}", file=sys.stderr)
        return EXIT_SETUP
    return _in_child(options, _explain)


def _explain(options: Options, loader: Loader) -> Result:
    try:
        answer = answer_to(read_question(options.question))
    except QuestionError as problem:
        print(f"{options.instance}: {problem}", file=sys.stderr)
        return EXIT_SETUP, ""
    answer = {"instance": options.instance, "policy_file": options.policy, **answer}
    return EXIT_OK, json.dumps(answer, indent=1) if options.json else text_of(answer)


def _check(options: Options, loader: Loader) -> Result:
    try:
        binding.check(Globals.dispatch_table.chains())
    except binding.ImpossibleBind as problem:
        log(None, "core.error", 0, "%s", (problem,))
        return EXIT_POLICY, ""
    status = _rehearse(loader)
    if status != EXIT_OK:
        return status, ""
    return EXIT_OK, (f"{options.instance}: Policy is usable; policy_file='{options.policy}', "
                     f"services='{len(Globals.services)}', zones='{len(Globals.zones)}', "
                     f"listeners='{len(Globals.dispatch_table.chains())}'")


def _describe(options: Options, loader: Loader) -> Result:
    try:
        description = describe(options)
        verify(description)
    except (PolicyError, DescriptionError) as problem:
        log(None, "core.error", 0, "%s: %s", (options.policy, problem))
        return EXIT_POLICY, ""
    return EXIT_OK, to_json(description)


def _rehearse(loader: Loader) -> int:
    """Run config() of every proxy class; return the exit status."""
    rehearsal = Rehearsal(loader.is_policy_file)
    rehearsal.run()
    for failure in rehearsal.failures:
        LoadFailed(loader.explain(failure)).log(is_brief=True)
    return EXIT_POLICY if rehearsal.failures else EXIT_OK


def _load_unprivileged(options: Options) -> Loader | int:
    """Return the loader of the policy, or the exit status when it cannot be loaded."""
    try:
        Log.Filter(options.verbosity, options.log_spec)
        options = dataclasses.replace(options, syslog=False, mode=Mode.FOREGROUND, verbosity=_VERBOSITY, log_spec="")
        LogSetup(options)
        privileges.drop(dataclasses.replace(privileges.prepare(options), capabilities=0))
    except (Log.BadLogSpec, privileges.SetupError) as problem:
        print(f"{options.instance}: {problem}", file=sys.stderr)
        return EXIT_SETUP
    Config.config.options.session_id_format = options.session_id_format
    name = options.process_names[0]
    loader = Loader(options.policy, options.names, name, options.is_master)
    try:
        loader.load()
    except LoadFailed as failure:
        failure.log(is_brief=True)
        return EXIT_POLICY
    return loader
