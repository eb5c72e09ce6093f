"""Exits with 0 if the engine has told its figures within the last half minute, else with 1.

It asks the metrics port, which needs no key. While a model loads there are no figures yet; if the
worker or its engine is gone, or hangs, they grow old. Uses the standard library only.

Usage: healthcheck.py [http://127.0.0.1:8082/metrics]
"""

import re
import sys
import time
import urllib.request

MAX_AGE_S = 30.0
_UPDATED = re.compile(rb"^pagetier_updated_timestamp_seconds\{[^}]*\} (\S+)$", re.MULTILINE)


def main(url: str) -> int:
    """Print one line on what was found and return the exit code."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5.0) as response:
            times = [float(found) for found in _UPDATED.findall(response.read())]
    except (OSError, ValueError) as exc:
        print(f"no metrics: {exc}")
        return 1
    if not times:
        print("no model is loaded yet")
        return 1
    age = time.time() - min(times)
    print(f"the oldest figures are {age:.0f} s old")
    return 0 if age <= MAX_AGE_S else 1


if __name__ == "__main__":
    sys.exit(main(*(sys.argv[1:] or ["http://127.0.0.1:8082/metrics"])))
