"""From a policy file to a running policy, or to `file:line: what is wrong, what to write instead`.

Theory of operation
    A worker loads one policy in its life, right after its fork, before any other thread exists;
    the fork gives the fresh interpreter state that each load needs.  The file runs as the module
    __main__, then its init() is called, usually the one of Zorp.Zorp, which calls the function
    of each instance name.  Zorp.acceptance.policy_load.loading() stands around whichever init() it is: dispatchers
    may be made only inside, and at its end the finished policy is checked.

    Helper modules are found in the directory of the policy first, then in /etc/zorp, then where
    Python finds its own.  No byte code is written there.  The texts come through
    Zorp.runtime.texts: from disk, or as they were accepted, for the replacement of a crashed worker.

    Whatever goes wrong ends in LoadFailed with one Complaint for the administrator: the place is
    the innermost frame that belongs to the policy (the file or a helper beside it), the text is
    what the exception says.  The steps towards it are kept as traceback lines for the log.
"""

from __future__ import annotations

import codecs
import dataclasses
import difflib
import inspect
import os
import pkgutil
import re
import sys
import threading
import traceback
import types
from collections.abc import Iterable

import Zorp
from Zorp import Core
from Zorp.acceptance.policy_load import loading
from Zorp.Exceptions import PolicyError
from Zorp.Log import log
from Zorp.runtime.borrowed import builtins_for
from Zorp.runtime.interpreter import Guard
from Zorp.runtime.texts import AcceptedText, PolicyTexts, WritableByAnybody

SYSTEM_POLICY_DIR = "/etc/zorp"


@dataclasses.dataclass(frozen=True, slots=True)
class Complaint:
    """Why a policy cannot be used."""

    text: str                        # file:line: what is wrong, what to write instead
    traceback: tuple[str, ...] = ()  # empty when the text says it all
    way: tuple[str, ...] = ()        # what of it is the policy's, empty when that is the line in the text


class LoadFailed(Exception):
    """The policy cannot be used; `complaint` says why, None when that is in the log already."""

    def __init__(self, complaint: Complaint | None) -> None:
        super().__init__(complaint.text if complaint else "the reason is in the log")
        self.complaint = complaint

    def log(self, *, is_brief: bool = False) -> None:
        """Write the complaint and the way to it, with is_brief only through the policy."""
        if self.complaint is not None:
            for line in self.complaint.way if is_brief else self.complaint.traceback:
                log(None, "core.error", 0, "Traceback: %s", (line,))
            log(None, "core.error", 0, "%s", (self.complaint.text,))


class InstanceNames(list):
    """The names for an init() with one argument, which may expect a list or one string."""

    def __eq__(self, other):
        return self[0] == other if isinstance(other, str) else list.__eq__(self, other)

    def __ne__(self, other):
        return not self == other

    def __str__(self):
        return self[0]

    __hash__ = None


class Loader:
    """Loads one policy file into this process; for the main thread."""

    def __init__(self, path: str, names: list[str], virtual_name: str, is_master: bool,
                 accepted: AcceptedText | None = None) -> None:
        """accepted: the text to load; None: what is on disk."""
        self._path = path
        self._names = names
        self._virtual_name = virtual_name
        self._is_master = int(is_master)
        self._directories = tuple(dict.fromkeys((os.path.dirname(path), SYSTEM_POLICY_DIR)))
        self._texts = PolicyTexts(path, self._directories, accepted)
        self._main: types.ModuleType | None = None
        self._guard = Guard()

    def load(self) -> AcceptedText:
        """Run the file and its init(); return the text that this was.  Raises LoadFailed."""
        source = self._read()
        self._prepare_interpreter()
        with self._guard:
            self._execute(source)
            self._initialise()
            replaced = self._guard.restore()
        self._check_traces(replaced)
        return self._texts.end()

    def _take_back_interpreter(self) -> list[str]:
        """The policy has failed: nothing of ours may run before this.  Return what builtins it replaced."""
        replaced = self._guard.restore()
        self._guard.restore_streams()
        return replaced

    def _refuse_replaced(self, replaced: list[str]) -> None:
        if replaced:
            self._fail(PolicyError(f"The policy replaced builtins of Python: {', '.join(replaced)}",
                                   remedy="use names of your own; all of Zorp uses the builtins, too"))

    def _check_traces(self, replaced: list[str]) -> None:
        """Refuse what must not be left behind by a load, or done in it."""
        self._refuse_replaced(replaced)
        if self._guard.forks:
            place = next((f"{step.filename}:{step.lineno}" for step in reversed(self._guard.forks[0])
                          if self.is_policy_file(step.filename)), f"{self._path}:0")
            self._fail(PolicyError("The policy made a process while it was loaded", place=place,
                                   remedy="take os.fork() out; a program can be started with subprocess"))
        if _thread_count() > 1:
            self._fail(PolicyError(
                "The policy started a thread while it was loaded",
                remedy="start threads from a proxy, or not at all: loading must end where it began"))

    def call_if_defined(self, function: str, *arguments) -> None:
        """Call deinit() or cleanup() of the policy with as many arguments as it takes; log what it raises.

        sys.exit() ends the function and nothing else: sessions may be running.
        """
        found = getattr(self._main, function, None)
        if found is None:
            return
        try:
            found(*arguments[:_positional_count(found, len(arguments))])
        except BaseException as problem:
            for line in self._traceback(problem):
                log(None, "core.error", 0, "Traceback: %s", (line,))

    def _read(self) -> str:
        try:
            data = self._texts.read_policy()
        except WritableByAnybody:
            log(None, "core.error", 0, "Error opening policy file; filename='%s'", (self._path,))
            raise LoadFailed(Complaint(f"{self._path}:0: everybody may write this file, so it is nobody's policy; "
                                       "take the right away with chmod o-w")) from None
        except OSError as problem:
            log(None, "core.error", 0, "Error opening policy file; filename='%s'", (self._path,))
            remedy = ("name the file of the policy with --policy" if isinstance(problem, FileNotFoundError) else
                      "make it readable for the user that zorp runs as")
            raise LoadFailed(Complaint(f"{self._path}: cannot be read, {problem.strerror}; {remedy}")) from problem
        try:
            return data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
        except UnicodeDecodeError:
            return data.decode("latin-1")

    def _prepare_interpreter(self) -> None:
        sys.dont_write_bytecode = True
        sys.argv = [""]
        self._texts.begin()
        main = types.ModuleType("__main__")
        main.__file__ = self._path
        sys.modules["__main__"] = self._main = main

    def _execute(self, source: str) -> None:
        try:
            code = compile(source, self._path, "exec", dont_inherit=True)
            self._main.__builtins__ = builtins_for(code, self._path)
            exec(code, self._main.__dict__)
        except BaseException as problem:
            replaced = self._take_back_interpreter()
            log(None, "core.error", 0, "Error parsing policy file; filename='%s'", (self._path,))
            log(None, "core.error", 0, "Error booting & parsing policy;")
            self._refuse_replaced(replaced)
            self._fail(problem)

    def _initialise(self) -> None:
        init = getattr(self._main, "init", None)
        try:
            with loading(self._names, self._virtual_name):
                result = self._call_init(init or Core.init, own=init is not None)
        except BaseException as problem:
            replaced = self._take_back_interpreter()
            log(None, "core.error", 0, "Error initializing policy;")
            self._refuse_replaced(replaced)
            self._fail(problem)
        if not isinstance(result, int) or not result:
            log(None, "core.error", 0, "Error initializing policy;")
            raise LoadFailed(None)

    def _call_init(self, init, *, own: bool):
        count = _positional_count(init, 3)
        if count == 1:
            result = init(InstanceNames(self._names))
            return 1 if own and result is None else result
        return init(*(self._names, self._virtual_name, self._is_master)[:count])

    def _fail(self, problem: BaseException):
        raise LoadFailed(self.explain(problem)) from problem

    def explain(self, problem: BaseException) -> Complaint:
        """Return the complaint for an exception that escaped from the policy, however strange it is."""
        try:
            return self._explained(problem)
        except BaseException:            # the policy's own exception class
            return Complaint(f"{self._path}:0: an exception was raised that cannot be shown; "
                             "raise exceptions that have a text")

    def _explained(self, problem: BaseException) -> Complaint:
        place = self._place_of(problem)
        if isinstance(problem, PolicyError):
            return Complaint(f"{getattr(problem, 'place', None) or place}: {problem}")
        if isinstance(problem, SyntaxError):
            shown = tuple(_lines(traceback.format_exception_only(problem)))
            return Complaint(f"{place}: {problem.msg}; correct this line{_about_python_2(problem)}", shown, shown)
        text = _text_of(problem)
        return Complaint(f"{place}: {type(problem).__name__}: {text}; {_remedy(problem)}",
                         tuple(self._traceback(problem)), self._way(problem))

    def _traceback(self, problem: BaseException) -> list[str]:
        """Return the traceback from the first line of the policy on, without what led there, a line each."""
        steps = traceback.TracebackException.from_exception(problem)
        first = next((index for index, step in enumerate(steps.stack) if self.is_policy_file(step.filename)), 0)
        steps.stack = traceback.StackSummary.from_list(steps.stack[first:])
        return _lines(steps.format())

    def _way(self, problem: BaseException) -> tuple[str, ...]:
        steps = [step for step in traceback.extract_tb(problem.__traceback__) if self.is_policy_file(step.filename)]
        return tuple(_lines(traceback.format_list(steps))) if len(steps) > 1 else ()

    def _place_of(self, problem: BaseException) -> str:
        if isinstance(problem, SyntaxError) and problem.filename and self.is_policy_file(problem.filename):
            return f"{problem.filename}:{problem.lineno}"
        place = f"{self._path}:0"
        for frame, line in traceback.walk_tb(problem.__traceback__):
            if self.is_policy_file(frame.f_code.co_filename):
                place = f"{frame.f_code.co_filename}:{line}"
        return place

    def is_policy_file(self, filename: str) -> bool:
        """Return whether the file is the policy, or a helper beside it or in /etc/zorp."""
        if filename == self._path:
            return True
        if filename.startswith(_OWN_PACKAGE):
            return False
        return any(os.path.dirname(filename) == directory for directory in self._directories)


_WRONG_EVER = re.compile("expected|unexpected indent|unindent|unterminated|unmatched|.*(never closed|does not match)")
_OWN_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def _text_of(problem: BaseException) -> str:
    """The text of an exception, whose class may be the policy's."""
    try:
        return str(problem) or "no further text"
    except BaseException:
        return "its text cannot be shown"


def _thread_count() -> int:
    """The threads of this process: the kernel's count, which knows those that Python does not."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:                      # in a new root without /proc
        return threading.active_count()


def _remedy(problem: BaseException) -> str:
    if isinstance(problem, NameError):
        return "define the name before this line, or import the module that has it"
    if isinstance(problem, AttributeError):
        owner = problem.obj
        module = owner.__name__ if isinstance(owner, types.ModuleType) else type(owner).__module__
        near = _similar(problem.name, dir(owner)) if module.partition(".")[0] == "Zorp" else ""
        return near or "write a name that this object has, or define it"
    if isinstance(problem, ImportError):
        package, _, name = (problem.name or "").partition(".")
        if package == "Zorp" and name:
            known = [module.name for module in pkgutil.iter_modules(Zorp.__path__) if module.name[0].isupper()]
            return ("" if name in Zorp.UNBUILT else _similar(name, known)) or "take its use out of the policy"
        return "put the module beside the policy, or take the import out"
    if isinstance(problem, TypeError):
        return _arguments_of(problem)
    return "correct what this line does"


def _similar(name: str | None, known: Iterable[str]) -> str:
    """Return a question for the name that was meant, "" when none resembles this one."""
    near = difflib.get_close_matches(name or "", known, n=1)
    return f"did you mean '{near[0]}'" if near and near[0] != name else ""


def _about_python_2(problem: SyntaxError) -> str:
    """Say more about a line that Python 2 may have taken."""
    if _WRONG_EVER.match(problem.msg or ""):
        return ""
    return ", policies are Python 3 and those of Python 2 are not translated"


def _arguments_of(problem: TypeError) -> str:
    """Say what a class of ours takes, if it is one that was called wrongly."""
    if " is required for " in _text_of(problem):             # Zorp.engine.attributes
        return "give the attribute such a value; attributes.md has those of every proxy"
    called = re.match(r"(\w+)\.__init__\(\)", _text_of(problem))
    cls = getattr(Core, called[1], None) if called is not None else None
    if not isinstance(cls, type):
        return "compare the arguments with reference.md, which has those of every class"
    taken = [str(parameter).split("=")[0] for parameter in inspect.signature(cls).parameters.values()]
    return f"{called[1]} takes {', '.join(taken)}; reference.md has what they mean"


def _positional_count(function, most: int) -> int:
    """How many of `most` positional arguments the function takes."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return most
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        return most
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return min(most, sum(parameter.kind in kinds for parameter in parameters))


def _lines(texts) -> list[str]:
    return [line for text in texts for line in text.rstrip("\n").split("\n")]
