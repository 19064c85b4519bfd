"""The report in a real browser, headless Chromium: nothing cut, no picture missing, the answer at once."""
import html
import json
import re
import shutil
import subprocess

import pytest
from conftest import ROOT

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")

# Shows the page in a frame of that width, and measures it there: the browser's own window can't be as narrow.
MEASURE = """<iframe style="width: WIDTHpx; height: 1000px; border: 0"></iframe><script>
const frame = document.querySelector('iframe')
frame.onload = () => {
    const page = frame.contentDocument
    const walker = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT), texts = []
    while (walker.nextNode()) {
        const range = page.createRange()
        range.selectNode(walker.currentNode)
        if (range.getBoundingClientRect().bottom < 1000) texts.push(walker.currentNode.data)
    }
    document.title = JSON.stringify({
        width: page.documentElement.scrollWidth, first: texts.join(' '),
        pictures: [...page.images].map(image => image.naturalWidth)})
}
frame.srcdoc = REPORT
</script>"""


def chromium(*arguments):
    """What the browser prints, and its messages."""
    done = subprocess.run([CHROMIUM, '--headless', '--no-sandbox', '--disable-gpu', '--enable-logging=stderr',
                           '--virtual-time-budget=10000', *map(str, arguments)],
                          capture_output=True, text=True, encoding='utf-8', timeout=300, check=True)
    return done.stdout, done.stderr


@pytest.fixture(params=['trained', 'committed'])
def report(request):
    """The report of short trainings, and the committed one."""
    folder = ROOT if request.param == 'committed' else request.getfixturevalue('trained')[0]
    return folder / 'results' / 'report.html'


@pytest.mark.parametrize('width', [1280, 400])
def test_at_any_width_all_is_seen_and_the_accuracies_first(width, report, tmp_path):
    text = report.read_text(encoding='utf-8')
    page = tmp_path / 'page.html'
    embedded = json.dumps(text).replace('</', '<\\/')
    page.write_text(MEASURE.replace('WIDTH', str(width)).replace('REPORT', embedded), encoding='utf-8')
    found, messages = chromium('--dump-dom', page.as_uri())
    measured = json.loads(html.unescape(re.search('<title>(.*?)</title>', found)[1]))
    assert measured['width'] <= width and 'CONSOLE' not in messages
    assert len(measured['pictures']) == text.count('<img ') > 0 and min(measured['pictures']) > 0
    accuracies = re.findall(r'[\d.]+ %', re.search('<p>Validation accuracy(.*?)</p>', text, re.DOTALL)[0])
    assert len(accuracies) == 3 - text.count('<td></td>' * 12) > 0  # one for each setting that was trained
    assert all(accuracy in measured['first'] for accuracy in accuracies)


def test_printed_it_has_at_most_eight_pages(report, tmp_path):
    chromium(f"--print-to-pdf={tmp_path / 'report.pdf'}", report.as_uri())
    assert 1 <= len(re.findall(rb'/Type\s*/Page\b', (tmp_path / 'report.pdf').read_bytes())) <= 8
