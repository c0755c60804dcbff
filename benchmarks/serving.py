"""Requests to a server that runs already, one image each, from this process:

    python -m trainer.serve model=outputs/flowers &
    python -m benchmarks.serving --data photos --requests 3000 --clients 32

Every client keeps one connection and asks again as soon as it is answered. Latency is from the first byte sent to the
last one read; processor time is the server's own, and means something on a busy machine too.
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
class Seen:
    """What clients have seen, together."""

    codes: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)  # of requests that were answered with 200
    without_retry_after: int = 0  # of those that were told 503


def bodies(folder: Path | None) -> tuple[list[bytes], str]:
    """Forms with one JPEG each, and their content type."""
    if folder:
        files = [path.read_bytes() for path in sorted(folder.rglob("*.jpg"))[:500]]
    else:
        noise = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (333, 500, 3), np.uint8)).save(noise, "JPEG")
        files = [noise.getvalue()]
    head = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jpg"\r\n\r\n'
    return [head + data + b"\r\n--x--\r\n" for data in files], "multipart/form-data; boundary=x"


def client(url: str, forms: list[bytes], kind: str, mine: range, seen: Seen) -> None:
    """Ask for its share of the requests, one after the other."""
    where = urlsplit(url)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=300)
    for number in mine:
        began = time.perf_counter()
        try:
            connection.request("POST", "/predict", forms[number % len(forms)], {"Content-Type": kind})
            answer = connection.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException) as error:
            seen.codes[type(error).__name__] += 1
            connection.close()
            continue
        seen.codes[str(answer.status)] += 1
        if answer.status == 200:
            seen.seconds.append(time.perf_counter() - began)
        elif answer.status == 503 and not answer.getheader("Retry-After"):
            seen.without_retry_after += 1


def processor_seconds(url: str) -> float:
    """That the server has used so far; NaN where there is none, since it was told to stop, say."""
    try:
        with urllib.request.urlopen(f"{url}/metrics") as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
    except OSError:
        return float("nan")
    return next(s.value for family in families for s in family.samples if s.name == "process_cpu_seconds_total")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("--url", default="http://127.0.0.1:8501")
    arguments.add_argument("--data", type=Path, help="a folder with JPEGs; without it one of noise, 500 x 333")
    arguments.add_argument("--requests", type=int, default=3000)
    arguments.add_argument("--clients", type=int, default=32)
    arguments.add_argument("--json", action="store_true", help="print one JSON object")
    options = arguments.parse_args()

    forms, kind = bodies(options.data)
    seen = Seen()
    shares = [range(n, options.requests, options.clients) for n in range(options.clients)]
    threads = [threading.Thread(target=client, args=(options.url, forms, kind, mine, seen)) for mine in shares]
    began, used = time.perf_counter(), processor_seconds(options.url)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    spent, used = time.perf_counter() - began, processor_seconds(options.url) - used
    p50, p99 = np.percentile(seen.seconds, [50, 99]) * 1000 if seen.seconds else (float("nan"), float("nan"))
    found = {
        "codes": dict(seen.codes),
        "clients": options.clients,
        "images_per_second": round(len(seen.seconds) / spent, 1),
        "processor_ms_an_image": round(1000 * used / max(len(seen.seconds), 1), 2),
        "p50_ms": round(float(p50), 1),
        "p99_ms": round(float(p99), 1),
        "without_retry_after": seen.without_retry_after,
    }
    print(json.dumps(found) if options.json else "\n".join(f"{name}: {value}" for name, value in found.items()))


if __name__ == "__main__":
    main()
