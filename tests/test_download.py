"""The images arrive, from the user's archive without network, else from servers that behave as servers do."""
import os
import shutil
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import script
from torchvision.datasets import CIFAR10

from CIFAR10_configuration import UserError, print_once
from dataset import data_load


@pytest.fixture
def server(small_cifar10, monkeypatch):
    """A server on loopback with good and bad paths; silence of half a second is enough to give it up."""
    data = (small_cifar10 / CIFAR10.filename).read_bytes()
    bodies = {'good': data, 'wrong': bytes(len(data)), 'endless': data + bytes(1 << 20),
              'truncated': data[:5000], 'stalling': data[:3000], 'html': b'<html>captive portal</html>'}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            path = self.path[1:]
            if path == 'gone':
                return
            body = bodies.get(path, b'sorry')
            self.send_response({'moved': 302, '404': 404, '503': 503}.get(path, 200))
            self.send_header('Location', '/good')
            self.send_header('Content-Length', len(data) if path in ('truncated', 'stalling') else len(body))
            self.end_headers()
            self.wfile.write(body)
            if path == 'stalling':  # who waits long enough gets all
                time.sleep(5)
                self.wfile.write(data[len(body):])

        def log_message(self, *_):
            pass

    set_timeout = socket.setdefaulttimeout
    monkeypatch.setattr(socket, 'setdefaulttimeout', lambda seconds: set_timeout(seconds / 40))
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.handle_error = lambda *_: None  # of a client that goes away
    server.urls = lambda *paths: [f'http://127.0.0.1:{server.server_address[1]}/{path}' for path in paths]
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    set_timeout(None)
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize('path', ['404', '503', 'html', 'wrong', 'endless', 'truncated', 'stalling', 'gone'])
@pytest.mark.parametrize('following', ['good', 'moved'])
def test_a_bad_server_is_given_up_for_the_next_which_delivers(path, following, server, tmp_path, capsys):
    urls = ['http://127.0.0.1:9/closed', *server.urls(path, following)]
    assert len(data_load('cifar10', tmp_path / 'empty', urls=urls)[0]) == 100
    assert capsys.readouterr().out.count('No images from') == 2
    assert sorted(os.listdir(tmp_path / 'empty')) == [CIFAR10.base_folder, CIFAR10.filename]


def test_images_arrive_though_the_error_output_is_closed(server, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, 'stderr', None)
    assert len(data_load('cifar10', tmp_path, urls=server.urls('good'))[0]) == 100


def test_without_any_good_server_one_sentence_says_what_to_do(server, tmp_path):
    urls = ' '.join(server.urls('404', 'html', 'truncated'))
    done = script(tmp_path, f'CIFAR10_train.py --model mlp --data-dir nothing --data-url {urls}')
    said = [line for line in done.stderr.splitlines() if line and not line.endswith('%')]  # no progress
    assert done.returncode == 2 and len(said) == 1
    assert done.stdout.count('No images from') == 3 and not os.listdir(tmp_path / 'nothing')
    assert 'cifar-10-python.tar.gz' in done.stderr and '--dataset synthetic' in done.stderr


def test_the_users_archive_or_batches_are_used_with_no_network(small_cifar10, tmp_path, monkeypatch):
    monkeypatch.setattr(socket.socket, 'connect', None)
    shutil.copy(small_cifar10 / CIFAR10.filename, tmp_path)
    assert len(data_load('cifar10', tmp_path)[0]) == 100
    (small_cifar10 / CIFAR10.filename).unlink()
    assert len(data_load('cifar10', small_cifar10)[1]) == 20


def test_a_damaged_batch_is_named_and_written_anew_and_a_damaged_archive_only_if_a_server_gives_it(
        small_cifar10, server, capsys):
    archive, batch = small_cifar10 / CIFAR10.filename, small_cifar10 / CIFAR10.base_folder / 'data_batch_3'
    good = batch.read_bytes()
    for bad in (good[:-1], b'', bytes(len(good))):
        batch.write_bytes(bad)
        print_once.cache_clear()
        data_load('cifar10', small_cifar10, urls=())
        assert 'cifar-10-batches-py is damaged' in capsys.readouterr().out and batch.read_bytes() == good
    archive.write_bytes(b'<html>')
    batch.write_bytes(b'')
    with pytest.raises(UserError, match='missing or damaged'):
        data_load('cifar10', small_cifar10, urls=())
    assert archive.read_bytes() == b'<html>' and 'unpacked' not in capsys.readouterr().out
    data_load('cifar10', small_cifar10, urls=server.urls('good'))
    assert batch.read_bytes() == good
