"""Questions to several generations: one answer, whatever comes late."""

from Zorp.process.timers import Timers
from Zorp.runtime.questions import Questions
from Zorp.runtime.slots import Handle, Slot, State


class Channel:
    closed = False


class Workers(list):
    """Two workers of one slot that note what they are asked."""

    def __init__(self, slot):
        self.asked = []
        super().__init__(Handle(pid, pid, slot, pid, Channel(), -1, state=state) for pid, state in
                         ((1, State.DRAINING), (2, State.SERVING)))
        slot.serving = self[1]

    def send(self, handle, kind, **fields):
        self.asked.append((handle, kind, fields))


def given():
    now = [100.0]
    slot = Slot("intra", True, None)
    workers, timers = Workers(slot), Timers(lambda: now[0])
    return now, timers, slot, workers, Questions(workers, timers)


def test_a_dump_of_sessions_joins_what_all_generations_say():
    _, _, slot, workers, questions = given()
    told = []
    questions.ask(slot, "DUMP conns", told.append)
    for handle, _, fields in reversed(workers.asked):
        questions.answered(handle, fields["number"], f"conns: None\nconns.{handle.pid}: None\n.")
    assert told == ["conns: None\nconns.2: None\nconns.1: None\n."]


def test_an_answer_that_comes_too_late_is_not_another_answer():
    # given a worker of an older policy that does not answer in time
    now, timers, slot, workers, questions = given()
    told = []
    questions.ask(slot, "DUMP conns", told.append)
    (new, _, first), (old, _, second) = workers.asked
    questions.answered(new, first["number"], "conns: None\n.")
    now[0] += 60
    timers.run_due()
    # when its answer comes after all
    questions.answered(old, second["number"], "conns: None\n.")
    # then the client has had one answer, that of the others
    assert told == ["conns: None\n."]


def test_whoever_has_hung_up_answers_nothing_at_once():
    _, _, slot, workers, questions = given()
    workers[1].channel.closed = True
    told = []
    questions.ask(slot, "GETVALUE info.pid", told.append)
    assert told == [None]
    assert workers.asked == []


def test_a_worker_that_cannot_count_its_sessions_stops_none_and_costs_nothing_else():
    # given two generations that are asked to stop a session
    _, _, slot, workers, questions = given()
    told = []
    questions.stop_session(slot, "svc/intra/plug:1", told.append)
    # when one has had a defect, then the other's answer counts
    for (handle, _, fields), text in zip(workers.asked, ("FAIL Internal error", "1"), strict=True):
        questions.answered(handle, fields["number"], text)
    assert told == ["OK Session stop requested; proxies='1'"]
