"""The process that renders: started late, kept, replaced when it dies, gone when its parent is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from hybrid_runtime.errors import TemplateError
from hybrid_runtime.text.render_worker import RenderWorker

ENDLESS = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"


def job(template, time_limit_s=5.0):
    return json.dumps({"template": template, "variables": {}, "time_limit_s": time_limit_s}).encode()


@pytest.fixture
def worker():
    worker = RenderWorker()
    yield worker
    worker.close()


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pid, limit_s):
    end = time.monotonic() + limit_s
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(pid)


def test_no_process_is_started_before_the_first_job(worker):
    assert worker.pid is None
    assert worker.render(job("a"), time_limit_s=5.0) == "a"
    assert alive(worker.pid)


def test_the_process_is_kept_between_jobs(worker):
    pids = set()
    for _ in range(3):
        worker.render(job("a"), time_limit_s=5.0)
        pids.add(worker.pid)
    assert len(pids) == 1


def test_an_overrun_kills_the_process_and_the_next_job_gets_a_new_one(worker):
    worker.render(job("a"), time_limit_s=5.0)
    pid = worker.pid
    with pytest.raises(TemplateError, match=r"time limit of 0\.2 s"):
        worker.render(job(ENDLESS, 0.2), time_limit_s=0.2)
    assert not alive(pid)
    assert worker.render(job("b"), time_limit_s=5.0) == "b"
    assert worker.pid != pid


def test_a_process_that_died_between_jobs_is_replaced(worker):
    worker.render(job("a"), time_limit_s=5.0)
    os.kill(worker.pid, signal.SIGKILL)
    assert wait_until_gone(worker.pid, 2.0)
    assert worker.render(job("b"), time_limit_s=5.0) == "b"


def test_a_process_that_dies_in_a_job_is_an_error_and_is_replaced(worker):
    worker.render(job("a"), time_limit_s=5.0)
    with ThreadPoolExecutor(1) as pool:
        render = pool.submit(worker.render, job(ENDLESS), time_limit_s=5.0)
        time.sleep(0.2)
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(TemplateError, match="ended its worker process"):
            render.result()
    assert worker.render(job("b"), time_limit_s=5.0) == "b"


def test_threads_share_the_process_and_get_their_own_answers(worker):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda idx: worker.render(job(f"text {idx}"), time_limit_s=5.0), range(100)))
    assert found == [f"text {idx}" for idx in range(100)]


def test_close_ends_the_process_and_it_can_start_again(worker):
    worker.render(job("a"), time_limit_s=5.0)
    pid = worker.pid
    worker.close()
    assert not alive(pid)
    assert worker.render(job("b"), time_limit_s=5.0) == "b"


def test_a_dropped_worker_ends_its_process():
    worker = RenderWorker()
    worker.render(job("a"), time_limit_s=5.0)
    pid = worker.pid
    del worker
    assert wait_until_gone(pid, 2.0)


def test_the_process_is_limited_and_knows_neither_torch_nor_our_environment(worker, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    worker.render(job("a"), time_limit_s=5.0)
    folder = Path(f"/proc/{worker.pid}")
    assert b"secret" not in (folder / "environ").read_bytes()
    assert "torch" not in (folder / "maps").read_text()
    limits = {line[:26].strip(): line[26:].split()[0] for line in (folder / "limits").read_text().splitlines()[1:]}
    assert limits["Max address space"] == str(512 << 20)
    assert limits["Max file size"] == "0"
    assert limits["Max core file size"] == "0"


def test_an_interpreter_without_jinja2_is_an_error_that_says_so(worker, monkeypatch, tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(TemplateError, match=r"did not start .* check that this Python can import jinja2"):
        worker.render(job("a"), time_limit_s=5.0)
    assert worker.pid is None


PARENT = """
import sys, threading, time
from hybrid_runtime.text.chat import render_chat, _shared_worker
render_chat("", [], bos_token="", eos_token="")
print(_shared_worker().pid, flush=True)
{then}
"""
RENDER_ENDLESSLY = f"render_chat({ENDLESS!r}, [], bos_token='', eos_token='', time_limit_s=1.5)"


def start_parent(then):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(then=then)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    return parent, int(parent.stdout.readline())


@pytest.mark.parametrize(
    ("then", "limit_s"),
    [("time.sleep(60)", 1.0), (RENDER_ENDLESSLY, 1.5 + 0.5 + 1.0)],  # rendering: the limit, the alarm's grace, slack
    ids=["idle", "rendering"],
)
def test_the_process_does_not_outlive_a_killed_parent(then, limit_s):
    parent, pid = start_parent(then)
    time.sleep(0.3)
    assert alive(pid)
    parent.kill()
    parent.wait()
    assert wait_until_gone(pid, limit_s)
    parent.stdout.close()


def test_the_process_ends_with_a_parent_that_ends_well():
    parent, pid = start_parent("")
    assert parent.wait(10) == 0
    assert wait_until_gone(pid, 1.0)
    parent.stdout.close()


def test_a_forked_process_gets_a_worker_of_its_own():
    code = (
        "import os\n"
        "from hybrid_runtime.text.chat import render_chat, _shared_worker\n"
        "render = lambda text: render_chat(text, [], bos_token='', eos_token='')\n"
        "render('a'); pid = _shared_worker().pid\n"
        "child = os.fork()\n"
        "if not child: os._exit(0 if render('b') == 'b' and _shared_worker().pid != pid else 1)\n"
        "status = os.waitpid(child, 0)[1]\n"
        "child = os.fork()\n"
        "if not child: raise SystemExit  # runs what is due at exit\n"
        "os.waitpid(child, 0)\n"
        "print(status, render('c'), _shared_worker().pid == pid)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.split() == ["0", "c", "True"]
