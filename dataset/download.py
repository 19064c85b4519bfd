"""Fetch CIFAR-10's archive: from the folder itself, else from the first mirror that delivers the official bytes."""
import hashlib
import http.client
import os
import time
import urllib.request

from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, extract_archive

from CIFAR10_configuration import UserError, show

ARCHIVE = 'cifar-10-python.tar.gz'
SIZE = 170_498_071  # bytes
SHA256 = '6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce'
STALLED, SLOW = 20, 200_000  # give a mirror up after so many seconds without a byte, or below so many bytes a second


def ensure_cifar10(data_dir, urls):
    """Make sure that data_dir holds CIFAR-10's batch files, each with its official MD5.

    Raises UserError where neither the archive in data_dir nor any URL gives them; OSError where they can't be written.
    """
    base, archive = data_dir / CIFAR10.base_folder, data_dir / ARCHIVE
    files = CIFAR10.train_list + CIFAR10.test_list + [[CIFAR10.meta['filename'], CIFAR10.meta['md5']]]
    bad = [base / name for name, md5 in files if not check_integrity(base / name, md5)]
    for file in bad:
        if file.exists():
            print(f"{file} is damaged: it is written anew.")
    if bad and not check_integrity(archive, CIFAR10.tgz_md5):
        fetch(archive, urls)
    if bad:
        extract_archive(archive, data_dir)


def is_official(archive):
    """Whether a file has the official archive's size and SHA-256."""
    return archive.exists() and archive.stat().st_size == SIZE and hashlib.sha256(archive.read_bytes()).hexdigest() == SHA256


def fetch(archive, urls):
    """Download the archive from the first URL that delivers it whole; what came stays in a .part file to continue from."""
    part = archive.with_suffix('.part')
    for number, url in enumerate(urls, 1):
        archive.parent.mkdir(parents=True, exist_ok=True)
        try:
            if not is_official(part):
                download(url, part, SLOW if number < len(urls) else 0)  # the last may be slow: nothing comes after it
            if is_official(part):
                if archive.exists():  # the user's own, and damaged
                    os.replace(archive, archive.with_suffix('.damaged'))
                os.replace(part, archive)
                return
            part.unlink()
            raise ValueError("it sent something else than the official archive")
        except (OSError, ValueError, http.client.HTTPException) as error:
            show(f"No images from {url}: {error}.", done=True)
    raise UserError(f"CIFAR-10 is not in {archive.parent}" + (f" and no server gave it ({len(urls)} tried)" if urls else "")
                    + f": put {ARCHIVE} there, or name its folder with --data-dir, or a server with --data-url, or try the "
                    "program with --dataset synthetic.")


def download(url, part, slow):
    """Append what is missing of the archive to part. Raises OSError or ValueError where the server fails or is too slow."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={'User-Agent': 'Mozilla/5.0'})  # some servers refuse Python's own
    if 0 < have < SIZE:
        request.add_header('Range', f'bytes={have}-')
    with urllib.request.urlopen(request, timeout=STALLED) as response:
        resumed = response.status == 206 and response.headers.get('Content-Range', '').startswith(f'bytes {have}-')
        if response.headers.get('Content-Length') not in (None, str(SIZE - have * resumed)):
            raise ValueError(f"it offers {response.headers['Content-Length']} bytes")
        with open(part, 'ab' if resumed else 'wb') as file:
            began, came = time.monotonic(), 0
            while have * resumed + came <= SIZE and (block := response.read1(1 << 20)):
                file.write(block)
                came += len(block)
                seconds = time.monotonic() - began
                if seconds > STALLED and came / seconds < slow:
                    raise ValueError(f"it is slow, {came / seconds / 1000:.0f} kB/s")
                show(f"{(have * resumed + came) / SIZE:.0%} of {SIZE / 1e6:.0f} MB, {came / (seconds + 1e-9) / 1e6:.1f} MB/s, "
                     f"{url}")
    if have * resumed + came < SIZE:
        raise ValueError("it broke off")
