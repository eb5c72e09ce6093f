import logging
import re

import pytest

from pagetier.handler.messages import AddRequest, RequestOutput
from pagetier.handler.request_log import RequestLog
from pagetier.handler.sampling_params import SamplingParams


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def log(clock):
    return RequestLog(clock)


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, logger="pagetier.handler.request_log")
    return lambda: [record.getMessage() for record in caplog.records]


def request(request_id="r"):
    return AddRequest(request_id, [1, 2, 3], SamplingParams())


def output(request_id="r", finish_reason=None, **fields):
    return RequestOutput(request_id, [7], finish_reason=finish_reason, **fields)


def test_line_at_the_end_tells_lengths_times_and_reason(log, clock, lines):
    log.started(request())
    clock.now += 0.5
    log.take([output(queue_seconds=0.2, num_cached_tokens=2)])
    clock.now += 0.25
    log.take([output(finish_reason="length", num_preemptions=1, num_cached_tokens=2)])
    assert lines() == [
        "request=r prompt_tokens=3 cached_tokens=2 output_tokens=2 queue_s=0.200 "
        "first_token_s=0.500 total_s=0.750 preemptions=1 finish=length"
    ]


def test_line_has_the_clients_own_name_where_there_is_one(log, lines):
    log.started(request(), "job-7")
    log.take([output(finish_reason="stop")])
    assert lines()[-1].startswith("request=r client_id=job-7 prompt_tokens=3 ")


def test_latencies_are_those_between_the_outputs(log, clock):
    log.started(request())
    for gap in (0.5, 0.25, 0.125):
        clock.now += gap
        log.take([output(queue_seconds=0.1)])
    clock.now += 1.0
    log.take([output(finish_reason="stop")])
    sums = {name: (h["count"], h["sum"]) for name, h in log.stats().items() if "sum" in h}
    assert sums == {
        "time_to_first_token_seconds": (1, 0.5),
        "inter_token_latency_seconds": (3, 1.375),
        "e2e_request_latency_seconds": (1, 1.875),
        "request_queue_time_seconds": (1, 0.1),
    }
    assert log.stats()["request_success"] == {"stop": 1, "length": 0, "abort": 0, "error": 0}


def test_outputs_of_one_request_have_their_own_gaps_and_one_end(log, clock, lines):
    log.started(AddRequest("r", [1], SamplingParams(n=2)))
    log.take([output(), output(index=1)])
    clock.now += 0.5
    log.take([output(finish_reason="length"), output(index=1)])
    assert lines() == []
    clock.now += 0.25
    log.take([output(index=1, finish_reason="stop")])
    gaps = log.stats()["inter_token_latency_seconds"]
    assert (gaps["count"], gaps["sum"]) == (3, 1.25)
    assert log.stats()["time_to_first_token_seconds"]["count"] == 1
    [line] = lines()
    assert "output_tokens=5 " in line


def test_client_that_leaves_has_no_whole_latency(log, lines):
    log.started(request("a"))
    log.started(request("b"))
    log.ended(["a", "unknown"], "abort")
    assert log.stats()["request_success"]["abort"] == 1
    assert log.stats()["e2e_request_latency_seconds"]["count"] == 0
    [line] = lines()
    assert line.startswith("request=a ")
    assert re.search(r"first_token_s=none .* finish=abort$", line)


def test_request_that_has_ended_is_counted_once(log, lines):
    log.started(request())
    log.take([output(finish_reason="stop")])
    log.ended(["r"], "abort")
    log.take([output(finish_reason="stop")])
    assert len(lines()) == 1
    assert sum(log.stats()["request_success"].values()) == 1


def test_histograms_given_out_do_not_change(log, clock):
    before = log.histograms()["time_to_first_token_seconds"]
    log.started(request())
    log.take([output()])
    assert before.count == 0
    assert log.histograms()["time_to_first_token_seconds"].count == 1
