"""Debian's chromium and an MLflow server over a sweep's database, both on this machine alone."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.expected_conditions import presence_of_element_located
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
START_SECONDS = 120


@contextmanager
def mlflow_server(database: Path) -> Iterator[str]:
    """A server over the database; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    log = database.with_name("server.log")
    with open(log, "w") as file:
        process = subprocess.Popen(
            [*command, "--backend-store-uri", f"sqlite:///{database}"], stdout=file, stderr=file, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(START_SECONDS * 4):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                time.sleep(0.25)
        else:
            raise AssertionError(f"no server after {START_SECONDS} s: {log.read_text()}")
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its worker too: the group is its own
        process.wait()


@contextmanager
def browser(profile: Path, width: int = 1600, height: int = 900) -> Iterator[WebDriver]:
    """Chromium without a window, with a fresh profile."""
    options = Options()
    options.binary_location = CHROMIUM or ""
    flags = (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "disable-dev-shm-usage", "no-first-run",
        "disable-background-networking", "disable-component-update", "disable-sync", f"window-size={width},{height}",
        f"user-data-dir={profile}",
    )  # fmt: skip
    for flag in flags:
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield driver
    finally:
        driver.quit()


def shown(page: WebDriver, address: str, what: str) -> WebElement:
    """Opens an address and waits for an element, by XPath or the name of its tag."""
    page.get(address)
    by = "xpath" if what.startswith("/") else "tag name"
    return WebDriverWait(page, START_SECONDS).until(presence_of_element_located((by, what)))
