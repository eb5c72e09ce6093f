"""What is exported is what ``metrics.yaml`` declares, in lines that the frontend can parse."""

import re
import threading

import pytest
import yaml

from pagetier.handler.errors import EngineDead
from pagetier.handler.metrics import Histogram
from pagetier.handler.metrics_export import (
    COUNTERS,
    GAUGES,
    PREFIX,
    MetricsExporter,
    samples,
    start_exporting,
)
from pagetier.handler.request_log import RequestLog
from pagetier.handler.torchserve import METRICS_CONFIG

# The pattern of TorchServe 0.12's Metric.java.
LINE = re.compile(
    r"\[METRICS\]\s*([\w\s]+)\.([\w\s]+):([0-9\-,.e]+)\|#([^|]*)"
    r"(\|#type:([^|,]+))\|#hostname:([^,]+),([^,]+)(,(.*))?"
)


def figures(**changed):
    stats = dict.fromkeys((*GAUGES, *COUNTERS), 0) | RequestLog().stats() | changed
    return stats, {"time_to_first_token_seconds": Histogram((0.5, 1.0))}


@pytest.fixture
def exporter():
    """An exporter with the texts it wrote, as ``written``."""
    made = MetricsExporter("org/model:8b", lambda text: made.written.append(text), lambda: 1e9)
    made.written = []
    return made


def take(exporter):
    """What was written since the last call: (name, labels) to (type, value)."""
    told = {}
    for line in "".join(exporter.written).splitlines():
        name, unit, value, labels, _, kind, *_ = LINE.fullmatch(line).groups()
        assert unit
        pairs = [pair.split(":") for pair in labels.split(",")]
        assert all(len(pair) == 2 for pair in pairs), labels
        told[name.removeprefix(PREFIX), *(text for _, text in pairs[1:])] = kind, float(value)
    exporter.written.clear()
    return told


def test_all_names_and_labels_are_declared():
    declared = {
        (metric["name"], kind): tuple(metric["dimensions"])
        for kind, metrics in yaml.safe_load(METRICS_CONFIG.read_text())["model_metrics"].items()
        for metric in metrics
    }
    exported = {
        (PREFIX + s.name, "counter" if s.is_counter else "gauge"): (
            "model_name",
            *(name for name, _ in s.labels),
        )
        for s in samples(figures()[0], RequestLog().histograms())
    }
    exported[f"{PREFIX}updated_timestamp_seconds", "gauge"] = ("model_name",)
    assert exported == declared


def test_everything_is_told_at_first_and_changes_later(exporter):
    exporter.export(*figures(num_requests_running=2, prompt_tokens=10))
    told = take(exporter)
    assert told["num_requests_running",] == ("GAUGE", 2)
    assert told["prompt_tokens_total",] == ("COUNTER", 10)
    assert told["generation_tokens_total",] == ("COUNTER", 0)
    assert told["request_success_total", "stop"] == ("COUNTER", 0)
    exporter.export(*figures(num_requests_running=1, prompt_tokens=14))
    assert take(exporter) == {
        ("num_requests_running",): ("GAUGE", 1),
        ("prompt_tokens_total",): ("COUNTER", 4),
        ("updated_timestamp_seconds",): ("GAUGE", 1e9),
    }


def test_latencies_are_cumulated_buckets(exporter):
    stats, histograms = figures()
    exporter.export(stats, histograms)
    exporter.written.clear()
    histogram = histograms["time_to_first_token_seconds"]
    for value in (0.25, 0.75, 3.0):
        histogram.observe(value)
    exporter.export(stats, histograms)
    told = take(exporter)
    name = "time_to_first_token_seconds"
    buckets = {le: told[f"{name}_bucket", le][1] for le in ("0.5", "1.0", "+Inf")}
    assert buckets == {"0.5": 1, "1.0": 2, "+Inf": 3}
    assert told[f"{name}_sum",][1] == 4.0
    assert told[f"{name}_count",][1] == 3


@pytest.mark.parametrize("value", [0.1, 1e-9, 1e22, 12345678.125])
def test_numbers_are_written_without_a_sign_that_the_frontend_does_not_know(exporter, value):
    exporter.export(*figures(kv_offload_load_time=value))
    assert take(exporter)["kv_offload_load_time_total",][1] == pytest.approx(value)


def test_pieces_end_with_their_lines_and_fit_a_pipe(exporter):
    exporter.export(figures()[0], RequestLog().histograms())
    assert len(exporter.written) > 1
    for piece in exporter.written:
        assert piece.endswith("\n")
        assert len(piece.encode()) <= 4096


def test_turn_in_which_the_engine_does_not_answer_is_left_out(exporter, monkeypatch):
    monkeypatch.setattr("pagetier.handler.metrics_export.EXPORT_SECONDS", 0.0)
    done = threading.Event()
    answers = iter([None, figures(num_requests_running=1)])

    def read():
        answer = next(answers)
        if answer is None:
            raise EngineDead("It is busy.")
        done.set()
        return answer

    start_exporting(exporter, read, lambda: not done.is_set())
    assert done.wait(10)
