"""The picture of the page in the documents: asks a running server about a file, and photographs.

    python -m lserve_jax.serve --model smollm2-135m-instruct-32k --attention lserve
    python tests/browser/picture.py http://127.0.0.1:8000 README.md \\
        "Where are the file and the compiled code kept?" "$" XDG_CACHE docs/page.png

The arguments are URL FILE QUESTION WORD SOUGHT OUT [dark]. FILE is registered as a prefix first.
Selenium and Chromium are those of ``tests/browser/run``; with Debian's fonts-inter the page has the
font of the picture. WORD is the token of the answer that is chosen, without spaces around it; the
cursor goes to the first page whose text has SOUGHT in it, in the first row that selected it.
"""

import io
import sys
from pathlib import Path

import httpx
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

WIDTH, HEIGHT = 1440, 1084  # CSS pixels


def main(url: str, file: str, question: str, word: str, sought: str, out: str, *theme: str) -> None:
    beginning = {"messages": [{"role": "user", "content": Path(file).read_text("utf-8")}]}
    httpx.post(f"{url}/v1/prefixes", json=beginning, timeout=None).raise_for_status()
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))
    try:
        scheme = [{"name": "prefers-color-scheme", "value": theme[0] if theme else "light"}]
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        size = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get(url)
        driver.find_element(By.ID, "file").send_keys(str(Path(file).resolve()))
        attached = driver.find_element(By.ID, "attached")
        WebDriverWait(driver, 10).until(lambda _: attached.is_displayed())
        driver.find_element(By.ID, "question").send_keys(question, Keys.ENTER)
        WebDriverWait(driver, 900).until(lambda d: d.find_elements(By.CLASS_NAME, "token"))
        tokens = driver.find_elements(By.CLASS_NAME, "token")
        print("|".join(token.text for token in tokens))
        next(token for token in tokens if token.text.strip() == word).click()
        cells = driver.find_element(By.ID, "cells")
        WebDriverWait(driver, 60).until(lambda _: cells.is_displayed())
        while sought not in driver.find_element(By.ID, "page-text").get_property("textContent"):
            cells.send_keys(Keys.ARROW_RIGHT)
        while not _is_selected(driver.find_element(By.ID, "cell").text):
            cells.send_keys(Keys.ARROW_DOWN)
        print(driver.find_element(By.ID, "cell").text)
        driver.execute_script("document.activeElement.blur()")
        picture = Image.open(io.BytesIO(driver.get_screenshot_as_png())).convert("RGB")
    finally:
        driver.quit()
    picture.quantize(128, dither=Image.Dither.NONE).save(out, optimize=True)


def _is_selected(cell: str) -> bool:
    return "selects" in cell and ": read." in cell


if __name__ == "__main__":
    main(*sys.argv[1:])
