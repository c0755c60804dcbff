"""Measure throughput and latency of a running server with requests of one image each:

    python -m trainer.serve model=outputs/flowers &
    python -m benchmarks.serving --data photos --requests 3000 --clients 32

Each client has one connection, and sends its next request when it has received the response. Latency is from the first
byte sent to the last byte received. Processor time is the server's CPU time, comparable also on a busy machine.
"""

import argparse
import http.client
import io
import json
import threading
import time
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families


@dataclass
class Responses:
    """The responses to all clients."""

    codes: Counter[str] = field(default_factory=Counter)  # number of responses by status code or name of an error
    seconds: list[float] = field(default_factory=list)  # latency of each request with status 200
    without_retry_after: int = 0  # number of 503 responses without the header Retry-After


def make_request_bodies(folder: Path | None) -> tuple[list[bytes], str]:
    """Make request bodies with one JPEG each, from a folder or of noise. Return them, and their content type."""
    if folder:
        files = [path.read_bytes() for path in sorted(folder.rglob("*.jpg"))[:500]]
    else:
        noise = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (333, 500, 3), np.uint8)).save(noise, "JPEG")
        files = [noise.getvalue()]
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n\r\n'
    return [head + data + b"\r\n--x--\r\n" for data in files], "multipart/form-data; boundary=x"


def run_client(url: str, bodies: list[bytes], content_type: str, numbers: range, responses: Responses) -> None:
    """Send a client's requests in sequence: for each number, the body of this index, modulo their number."""
    url_parts = urlsplit(url)
    connection = http.client.HTTPConnection(url_parts.hostname or "", url_parts.port, timeout=300)
    for number in numbers:
        started_at = time.perf_counter()
        try:
            connection.request("POST", "/predict", bodies[number % len(bodies)], {"Content-Type": content_type})
            response = connection.getresponse()
            response.read()
        except (OSError, http.client.HTTPException) as error:
            responses.codes[type(error).__name__] += 1
            connection.close()
            continue
        responses.codes[str(response.status)] += 1
        if response.status == 200:
            responses.seconds.append(time.perf_counter() - started_at)
        elif response.status == 503 and not response.getheader("Retry-After"):
            responses.without_retry_after += 1


def read_processor_seconds(url: str) -> float:
    """Read the server's CPU seconds so far from its metrics; NaN if it does not respond."""
    try:
        with urllib.request.urlopen(f"{url}/metrics") as response:
            families = list(text_string_to_metric_families(response.read().decode()))
    except OSError:
        return float("nan")
    return next(s.value for family in families for s in family.samples if s.name == "process_cpu_seconds_total")


def main() -> None:
    """Send requests from all clients at the same time, and print the measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8501")
    parser.add_argument("--data", type=Path, help="a folder with JPEGs; default: one of noise, 500 x 333")
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()

    bodies, content_type = make_request_bodies(options.data)
    responses = Responses()
    numbers = [range(n, options.requests, options.clients) for n in range(options.clients)]
    threads = [
        threading.Thread(target=run_client, args=(options.url, bodies, content_type, client_numbers, responses))
        for client_numbers in numbers
    ]
    started_at, processor_seconds = time.perf_counter(), read_processor_seconds(options.url)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed, processor_seconds = (
        time.perf_counter() - started_at,
        read_processor_seconds(options.url) - processor_seconds,
    )
    p50, p99 = np.percentile(responses.seconds, [50, 99]) * 1000 if responses.seconds else (float("nan"), float("nan"))
    summary = {
        "codes": dict(responses.codes),
        "clients": options.clients,
        "images_per_second": round(len(responses.seconds) / elapsed, 1),
        "processor_ms_an_image": round(1000 * processor_seconds / max(len(responses.seconds), 1), 2),
        "p50_ms": round(float(p50), 1),
        "p99_ms": round(float(p99), 1),
        "without_retry_after": responses.without_retry_after,
    }
    print(json.dumps(summary) if options.json else "\n".join(f"{name}: {value}" for name, value in summary.items()))


if __name__ == "__main__":
    main()
