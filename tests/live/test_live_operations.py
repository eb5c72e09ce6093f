"""What operators do with a running server: watch it, talk with it, scale it."""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import yaml
from support.live import (
    MODEL_FOLDER,
    NAME,
    READY_TIMEOUT_S,
    SETTINGS,
    LiveServer,
    complete,
    wait_for,
)
from support.ports import free_ports

from pagetier.handler.archive import create_archive
from pagetier.handler.cli import main
from pagetier.handler.torchserve import DEFAULT_CONFIG, METRICS_CONFIG, TorchServe

pytestmark = [pytest.mark.live, pytest.mark.xdist_group("live")]

SAMPLE = re.compile(r"^(?P<name>pagetier_\w+)\{(?P<labels>[^}]*)\} (?P<value>\S+)$", re.MULTILINE)


def scrape(url):
    """Values of our metrics, by name and labels beside model and host."""
    samples = {}
    for found in SAMPLE.finditer(httpx.get(f"{url}/metrics").raise_for_status().text):
        labels = dict(re.findall(r'(\w+)="([^"]*)"', found["labels"]))
        assert labels.pop("Hostname")
        if labels.pop("model_name") == NAME:
            samples[found["name"], *labels.values()] = float(found["value"])
    return samples


def test_metrics_port_shows_every_metric_and_what_was_done(server):
    before = server.stats()
    complete(server.client, "Return the", max_tokens=20)
    stop = complete(server.client, "Read up to", max_tokens=8).choices[0].text[2:5]
    complete(server.client, "Read up to", max_tokens=8, stop=[stop])
    stream = complete(server.client, "Return the", max_tokens=400, stream=True)
    next(stream)
    stream.close()
    wait_for(lambda: server.stats()["num_requests_running"] == 0, 2.0, "it was not aborted")
    after = server.stats()
    url = server.server.metrics_url

    def is_told():
        return scrape(url)["pagetier_generation_tokens_total",] >= after["generation_tokens"]

    wait_for(is_told, 10.0, "the metrics port does not tell it")
    samples = scrape(url)
    declared = {
        metric["name"]
        for metrics in yaml.safe_load(METRICS_CONFIG.read_text())["model_metrics"].values()
        for metric in metrics
    }
    assert {name for name, *_ in samples} == declared
    assert samples["pagetier_num_gpu_blocks",] == SETTINGS["num_gpu_blocks_override"]
    assert samples["pagetier_num_requests_running",] == 0
    ended = {how: after["request_success"][how] - before["request_success"][how] for how in
             ("length", "stop", "abort", "error")}  # fmt: skip
    assert ended == {"length": 2, "stop": 1, "abort": 1, "error": 0}
    for how in ended:
        assert samples["pagetier_request_success_total", how] >= ended[how]
    for name in (
        "time_to_first_token",
        "inter_token_latency",
        "e2e_request_latency",
        "request_queue_time",
    ):
        buckets = [v for key, v in samples.items() if key[0] == f"pagetier_{name}_seconds_bucket"]
        count = samples[f"pagetier_{name}_seconds_count",]
        assert samples[f"pagetier_{name}_seconds_bucket", "+Inf"] == max(buckets) == count > 0
        assert 0 <= samples[f"pagetier_{name}_seconds_sum",] < 60 * count
    assert abs(time.time() - samples["pagetier_updated_timestamp_seconds",]) < 30


def test_each_request_is_logged_without_its_text(server):
    log = server.server.log_path
    num_before = len(log.read_text())  # other tests' requests are in it too
    complete(server.client, "A secret prompt", max_tokens=7)

    def lines():
        new = log.read_text()[num_before:].splitlines()
        return [line for line in new if " output_tokens=7 " in line and "finish=length" in line]

    wait_for(lambda: bool(lines()), 5.0, "it was not logged")
    assert re.search(
        r"request=\S+ prompt_tokens=\d+ cached_tokens=\d+ output_tokens=7 queue_s=\d+\.\d{3} "
        r"first_token_s=\d+\.\d{3} total_s=\d+\.\d{3} preemptions=0 finish=length$",
        lines()[-1],
    )
    assert "secret" not in log.read_text()


def test_log_line_is_found_by_the_clients_own_name(server):
    name = "job-of-the-log-test"
    complete(server.client, "a", max_tokens=1, extra_headers={"X-Request-Id": name})
    log = server.server.log_path
    wait_for(lambda: f" client_id={name} " in log.read_text(), 5.0, "it was not logged")


def test_top_and_chat_talk_with_the_server(server, capsys):
    arguments = [server.base_url, "--key", server.server.inference_key]
    assert main(["top", *arguments, "--interval", "0.1"]) == 0
    assert "tokens generated" in capsys.readouterr().out
    assert main(["chat", *arguments, "--max-tokens", "8", "--temperature", "0", "-m", "Hi"]) == 0
    assert capsys.readouterr().out.strip()


class Management:
    """The management API of a server of one's own."""

    def __init__(self, server):
        self.url = f"{server.management_url}/models"
        self._headers = {"Authorization": f"Bearer {server._management_key}"}

    def ask(self, method, path="", **parameters):
        return httpx.request(
            method,
            f"{self.url}{path}",
            params={"synchronous": "true", **parameters} if method != "GET" else parameters,
            headers=self._headers,
            timeout=READY_TIMEOUT_S,
        )

    def __call__(self, method, path="", **parameters):
        """The decoded answer."""
        answer = self.ask(method, path, **parameters)
        assert answer.status_code == 200, answer.text
        return answer.json()


def test_customized_description_is_answered_and_holds_nothing_up(server):
    """TorchServe's frontend described such a model for ever, and it served no more."""
    manage = Management(server.server)
    text = complete(server.client, "Return the", max_tokens=8).choices[0].text
    for _ in range(2):
        [described] = manage("GET", f"/{NAME}", customized="true")
        assert described["customizedMetadata"]["max_model_len"] == 1024
        again = complete(server.client, "Return the", max_tokens=8, timeout=10)
        assert again.choices[0].text == text


def test_customized_description_waits_for_a_stream_that_runs(server):
    manage = Management(server.server)
    alone = complete(server.client, "Return the", max_tokens=200).choices[0].text
    stream = complete(server.client, "Return the", max_tokens=200, stream=True)
    first = next(stream).choices[0].text
    with ThreadPoolExecutor(1) as threads:
        described = threads.submit(manage, "GET", f"/{NAME}", customized="true")
        text = first + "".join(c.choices[0].text for c in stream if c.choices)
        assert described.result(10)[0]["customizedMetadata"]["model"] == NAME
    assert text == alone


class Managed:
    """A server of this module's own, whose models may be registered over HTTP."""

    def __init__(self, server, folder, allowed):
        self.live = LiveServer(server)
        self.manage = Management(server)
        self.folder = folder
        self.allowed = allowed  # archives may be registered from there
        self.text = self.say(8)

    def say(self, max_tokens):
        answer = complete(self.live.client, "Return the", max_tokens=max_tokens)
        assert answer.choices, answer  # an error of the frontend's own
        return answer.choices[0].text


@pytest.fixture(scope="module")
def managed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("managed")
    allowed = folder / "allowed"
    allowed.mkdir()
    config = folder / "config.properties"
    text = DEFAULT_CONFIG.read_text(encoding="utf-8")
    text = text.replace("enable_model_api=false", "enable_model_api=true")
    config.write_text(text.replace("allowed_urls=file://.*", f"allowed_urls=file://{allowed}/.*"))
    archive = create_archive(str(MODEL_FOLDER), folder / f"{NAME}.mar", settings=SETTINGS)
    server = TorchServe([archive], ts_config=config, port=free_ports(), log_dir=folder / "logs")
    with server:
        server.wait_ready(READY_TIMEOUT_S)
        yield Managed(server, folder, allowed)


def test_model_is_scaled_to_zero_and_back(managed):
    managed.manage("PUT", f"/{NAME}", min_worker=0, max_worker=0)
    body = json.dumps({"model": NAME, "prompt": "a", "max_tokens": 1})
    assert managed.live.post("completions", body).status_code == 503
    managed.manage("PUT", f"/{NAME}", min_worker=1, max_worker=1)
    [described] = managed.manage("GET", f"/{NAME}")
    assert [worker["status"] for worker in described["workers"]] == ["READY"]
    assert managed.say(8) == managed.text


def test_second_model_is_registered_and_unregistered_beside_the_first(managed):
    """As docs/operations.md says: only archives of one folder, only with the management key."""
    live, manage = managed.live, managed.manage
    second = managed.allowed / "second.mar"
    create_archive(str(MODEL_FOLDER), second, settings=SETTINGS)

    def register(archive):
        return manage.ask("POST", url=f"file://{archive}", initial_workers=1).status_code

    def ask_second():
        return httpx.post(
            f"{live.server.openai_base_url('second')}/completions",
            json={"prompt": "Return the", "max_tokens": 8, "temperature": 0},
            headers=live.headers,
            timeout=60,
        )

    outside = managed.folder / f"{NAME}.mar"
    assert outside.exists()
    assert register(outside) >= 400
    assert register(f"{managed.allowed}/../{outside.name}") >= 400
    assert httpx.post(manage.url, params={"url": f"file://{second}"}).status_code == 400
    assert ask_second().status_code == 404
    alone = managed.say(400)
    stream = complete(live.client, "Return the", max_tokens=400, stream=True)
    streamed = next(stream).choices[0].text
    assert register(second) == 200
    assert ask_second().json()["choices"][0]["text"] == managed.text
    assert manage.ask("DELETE", "/second/1.0").status_code == 200
    assert ask_second().status_code == 404
    assert streamed + "".join(c.choices[0].text for c in stream if c.choices) == alone
    assert managed.say(8) == managed.text


def test_second_worker_does_not_start_and_the_first_serves_on(managed):
    managed.manage.ask("PUT", f"/{NAME}", min_worker=2, max_worker=2, synchronous="false")
    log = managed.live.server.log_path

    def says_why():
        # On a busy machine the frontend was seen to answer a request of these seconds with an
        # error of its own; whatever is served comes from the first worker, and is right.
        answer = complete(managed.live.client, "Return the", max_tokens=60)
        assert not answer.choices or answer.choices[0].text.startswith(managed.text)
        return "Another worker of this model runs already" in log.read_text()

    wait_for(says_why, 60.0, "the log does not say why")
    for _ in range(5):
        assert managed.say(60).startswith(managed.text)
    managed.manage("PUT", f"/{NAME}", min_worker=1, max_worker=1)
    [described] = managed.manage("GET", f"/{NAME}")
    assert [worker["status"] for worker in described["workers"]] == ["READY"]
    assert managed.say(8) == managed.text
