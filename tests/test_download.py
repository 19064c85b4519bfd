"""The images arrive, from the user's archive without network, else from servers that behave as servers do."""

import shutil
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import script

from CIFAR10_configuration import UserError, print_once
from dataset import data_load, download


@pytest.fixture
def server(small_cifar10, monkeypatch):
    """A server on loopback with good and bad paths, and an empty folder; .asked lists the requests."""
    data = (small_cifar10 / download.ARCHIVE).read_bytes()
    stop = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = 'HTTP/1.1'

        def log_message(self, *_):
            pass

        def reply(self, body, code=200, length=None, **headers):
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name.replace('_', '-'), value)
            self.send_header('Content-Length', str(len(body) if length is None else length))
            self.send_header('Connection', 'close')
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = True

        def do_GET(self):
            self.server.asked.append((self.path, self.headers.get('Range')))
            start = int(self.headers.get('Range', 'bytes=0-')[6:-1])
            if self.path == '/good':
                if start:
                    return self.reply(
                        data[start:], 206, Content_Range=f'bytes {start}-{len(data) - 1}/{len(data)}'
                    )
                return self.reply(data)
            if self.path == '/moved':
                return self.reply(b'', 302, Location='/good')
            if self.path == '/no_ranges':
                return self.reply(data)
            if self.path == '/wrong_range':
                return self.reply(data[5:], 206, Content_Range=f'bytes 5-{len(data) - 1}/{len(data)}')
            if self.path == '/truncated':
                return self.reply(data[:5000], length=len(data))
            if self.path == '/html':
                return self.reply(b'<html>captive portal</html>', Content_Type='text/html')
            if self.path == '/wrong':
                return self.reply(bytes(len(data)))
            if self.path == '/endless':
                return self.reply(data + bytes(1 << 20))
            if self.path == '/stalling':
                self.reply(data[:3000], length=len(data))
                stop.wait(10)
            if self.path == '/slow':
                self.reply(b'', length=len(data))
                for byte in data:
                    if stop.wait(0.05):
                        return
                    self.wfile.write(bytes([byte]))
            if self.path in ('/404', '/503'):
                return self.reply(b'sorry', int(self.path[1:]))

    monkeypatch.setattr(download, 'STALLED', 0.5)
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.daemon_threads, server.asked, server.folder, server.data = (
        True,
        [],
        small_cifar10.parent / 'empty',
        data,
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.urls = lambda *paths: [f'http://127.0.0.1:{server.server_address[1]}/{path}' for path in paths]
    yield server
    stop.set()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize('path', ['good', 'moved', 'no_ranges'])
def test_a_good_server_delivers(path, server):
    assert len(data_load('cifar10', server.folder, urls=server.urls(path))[0]) == 100
    assert not list(server.folder.glob('*.part'))


@pytest.mark.parametrize(
    'path', ['404', '503', 'html', 'wrong', 'endless', 'truncated', 'wrong_range', 'stalling', 'slow', 'gone']
)
def test_a_bad_server_is_given_up_for_the_next(path, server, capsys):
    began = time.monotonic()
    assert (
        len(
            data_load(
                'cifar10', server.folder, urls=['http://127.0.0.1:9/closed', *server.urls(path, 'good')]
            )[0]
        )
        == 100
    )
    assert time.monotonic() - began < 10 and capsys.readouterr().out.count('No images from') == 2


@pytest.mark.parametrize('following', ['good', 'no_ranges', 'wrong_range'])
def test_a_partial_file_is_continued_where_the_server_allows_and_never_taken_for_a_whole_one(
    following, server
):
    with pytest.raises(UserError, match='no server gave it'):
        data_load('cifar10', server.folder, urls=server.urls('truncated'))
    assert (
        not (server.folder / download.ARCHIVE).exists()
        and next(server.folder.glob('*.part')).stat().st_size == 5000
    )
    data_load('cifar10', server.folder, urls=server.urls(following, 'good'))
    assert server.asked[1] == (f'/{following}', 'bytes=5000-')
    assert (server.folder / download.ARCHIVE).read_bytes() == server.data


def test_without_any_good_server_one_sentence_says_what_to_do(server):
    done = script(
        server.folder.parent,
        'CIFAR10_train.py',
        '--model',
        'mlp',
        '--data-dir',
        'nothing',
        '--data-url',
        *server.urls('404', 'html'),
    )
    assert (
        done.returncode == 2
        and len(done.stderr.splitlines()) == 1
        and done.stdout.count('No images from') == 2
    )
    assert 'cifar-10-python.tar.gz' in done.stderr and '--dataset synthetic' in done.stderr


def test_the_users_archive_or_batches_are_used_with_no_network(small_cifar10, monkeypatch):
    monkeypatch.setattr('urllib.request.urlopen', None)
    archive_only = small_cifar10.parent / 'archive'
    archive_only.mkdir()
    shutil.copy(small_cifar10 / download.ARCHIVE, archive_only)
    assert len(data_load('cifar10', archive_only)[0]) == 100
    (small_cifar10 / download.ARCHIVE).unlink()
    assert len(data_load('cifar10', small_cifar10)[1]) == 20


def test_a_damaged_batch_is_named_and_written_anew(small_cifar10, server, capsys):
    batch = small_cifar10 / 'cifar-10-batches-py' / 'data_batch_3'
    good = batch.read_bytes()
    for bad in (good[:-1], b'', bytes(len(good))):
        batch.write_bytes(bad)
        print_once.cache_clear()
        data_load('cifar10', small_cifar10, urls=())
        assert 'cifar-10-batches-py is damaged' in capsys.readouterr().out and batch.read_bytes() == good
    (small_cifar10 / download.ARCHIVE).write_bytes(b'<html>')
    batch.write_bytes(b'')
    with pytest.raises(UserError):
        data_load('cifar10', small_cifar10, urls=())
    data_load('cifar10', small_cifar10, urls=server.urls('good'))
    assert batch.read_bytes() == good
    assert [file.read_bytes() for file in small_cifar10.glob('*.damaged')] == [b'<html>']
