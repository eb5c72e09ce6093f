"""What cannot be built or run here is at least well-formed, consistent, and names what exists."""

import json
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml

from pagetier.handler.torchserve import DEFAULT_CONFIG, METRICS_CONFIG, read_properties

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
OURS = re.compile(r"\bpagetier_\w+")


def declared_metrics():
    metrics = yaml.safe_load(METRICS_CONFIG.read_text())["model_metrics"]
    return {metric["name"] for kind in metrics.values() for metric in kind}


def instructions():
    """The Dockerfile's instructions and their arguments, continued lines joined."""
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(maxsplit=1)) for line in lines]


def documents(path):
    return list(yaml.safe_load_all((DEPLOY / path).read_text()))


@pytest.mark.skipif(sys.platform != "linux", reason="hadolint is installed on Linux only")
def test_dockerfile_pleases_its_linter():
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run(
        [hadolint, DEPLOY / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_image_runs_without_privileges_on_cuda_and_tells_its_health():
    parts = dict(instructions())
    assert parts["FROM"].startswith("nvidia/cuda:")
    assert parts["USER"].isdigit()
    assert int(parts["USER"]) > 0
    assert "healthcheck.py" in parts["HEALTHCHECK"]


def test_image_copies_files_that_exist_and_are_in_the_build_s_context():
    allowed = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    copied = [arguments.split()[:-1] for kind, arguments in instructions() if kind == "COPY"]
    assert copied
    for source in (source for sources in copied for source in sources):
        assert (ROOT / source).exists(), source
        assert source in allowed, source


@pytest.mark.parametrize(
    ("settings", "may_differ"),
    [
        (read_properties(DEPLOY / "config.properties"), set()),
        (None, {"disable_token_authorization", "token_expiration_min"}),
    ],
    ids=["image", "kubernetes"],
)
def test_settings_of_containers_are_the_safe_ones_but_for_the_addresses(
    tmp_path, settings, may_differ
):
    if settings is None:
        [text] = [
            document["data"]["config.properties"]
            for document in documents("kubernetes/pagetier.yaml")
            if document["kind"] == "ConfigMap"
        ]
        (tmp_path / "config.properties").write_text(text)
        settings = read_properties(tmp_path / "config.properties")
    safe = read_properties(DEFAULT_CONFIG)
    assert set(settings) <= set(safe)
    changed = {key for key in settings if settings[key] != safe[key]} - may_differ
    assert changed == {"inference_address", "metrics_address", "vmargs"}
    assert settings["management_address"] == "http://127.0.0.1:8081"


def test_compose_mounts_files_that_exist_and_opens_ports_to_this_machine_only():
    [compose] = documents("compose.yaml")
    assert set(compose["services"]) == {"pagetier", "prometheus", "grafana"}
    for service in compose["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (DEPLOY / source).exists(), source
            elif not source.startswith("${"):
                assert source in compose["volumes"]
    assert (DEPLOY / compose["services"]["pagetier"]["build"]["dockerfile"][7:]).is_file()
    [device] = compose["services"]["pagetier"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


def test_prometheus_scrapes_the_metrics_port_and_knows_its_alerts():
    [prometheus] = documents("prometheus.yml")
    [job] = prometheus["scrape_configs"]
    assert job["static_configs"][0]["targets"] == ["pagetier:8082"]
    [alerts] = documents(prometheus["rule_files"][0])
    rules = [rule for group in alerts["groups"] for rule in group["rules"]]
    for rule in rules:
        assert set(OURS.findall(rule["expr"])) <= declared_metrics(), rule["alert"]
    assert len({rule["alert"] for rule in rules}) == len(rules) > 0


def test_dashboard_shows_all_declared_metrics_and_no_others():
    dashboard = json.loads((DEPLOY / "grafana" / "pagetier.json").read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    named = {
        name
        for panel in panels
        for target in panel["targets"]
        for name in OURS.findall(target["expr"])
    }
    assert named == declared_metrics()
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    places = [
        (x, y)
        for panel in dashboard["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(places)) == len(places), "panels overlap"
    assert max(x for x, _ in places) < 24


def test_dashboard_is_where_grafana_looks_for_it():
    [provider] = documents("grafana/provisioning/dashboards/pagetier.yaml")[0]["providers"]
    [compose] = documents("compose.yaml")
    folder = provider["options"]["path"]
    assert any(
        volume.startswith(f"./grafana/pagetier.json:{folder}/")
        for volume in compose["services"]["grafana"]["volumes"]
    )


@pytest.mark.parametrize("name", ["pagetier.yaml", "kserve.yaml"])
def test_kubernetes_objects_use_one_gpu_the_image_s_user_and_volumes_that_exist(name):
    found = documents(f"kubernetes/{name}")
    assert all({"apiVersion", "kind", "metadata", "spec"} - {"spec"} <= set(d) for d in found)
    [pod] = [
        d["spec"]["template"]["spec"] if d["kind"] == "Deployment" else d["spec"]["predictor"]
        for d in found
        if d["kind"] in ("Deployment", "InferenceService")
    ]
    [container] = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    user = {**pod.get("securityContext", {}), **container["securityContext"]}
    assert user["runAsNonRoot"] is True
    assert str(user["runAsUser"]) == dict(instructions())["USER"]
    assert container["readinessProbe"]["exec"]["command"][1] == "/opt/pagetier/healthcheck.py"
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_litellm_calls_a_model_under_its_route():
    [config] = documents("litellm/config.yaml")
    [model] = config["model_list"]
    parameters = model["litellm_params"]
    assert parameters["model"].startswith("openai/")
    assert re.fullmatch(r"http://[^/]+/predictions/\w+/1\.0/v1", parameters["api_base"])
    assert parameters["api_key"].startswith("os.environ/")


@pytest.fixture
def metrics_page():
    """A metrics port that shows ``page.text``."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(server.text.encode())

        def log_message(self, format, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        server.text = ""
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("age", "code", "says"),
    [(3, 0, " s old"), (300, 1, " s old"), (None, 1, "no model is loaded yet")],
)
def test_health_is_the_age_of_the_figures(metrics_page, age, code, says):
    if age is not None:
        name = "pagetier_updated_timestamp_seconds"
        value = f"{time.time() - age:.9E}".replace("E+09", "E9")
        metrics_page.text = f'# TYPE {name} gauge\n{name}{{model_name="m",Hostname="h",}} {value}\n'
    command = [sys.executable, DEPLOY / "healthcheck.py"]
    url = f"http://127.0.0.1:{metrics_page.server_port}/metrics"
    done = subprocess.run([*command, url], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert says in done.stdout


def test_health_without_a_server_is_bad():
    done = subprocess.run(
        [sys.executable, DEPLOY / "healthcheck.py", "http://127.0.0.1:9/metrics"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "no metrics" in done.stdout
