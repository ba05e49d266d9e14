"""evaluate.py: every way to name a function, paired runs, the card and the figures."""
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import evaluate
import models
import models_own
import training
from activation import NAMED, Activation, named
from cell import random_expression
from evaluate import Candidate, resolve, seeds_of
from ledger import report

ROOT = Path(evaluate.__file__).resolve().parent
TIMES = ('seconds', 'ms_step')


# ---------------------------------------------------------------------------------------------------------------------
# Every way to name an activation, and what a wrong name gets.

def same(candidate, function):
    x = torch.linspace(-4, 4, 81)
    torch.testing.assert_close(candidate.activation(x), function(x))


def test_names(run_folder, monkeypatch):
    """A run folder, its activation.json, a standard or reference name, an expression, a random cell."""
    found = lambda x: (x * 0.5 * F.relu(x)).clamp(-5, 5)
    for text in str(run_folder), f'{run_folder}/', f'{run_folder}/activation.json':
        candidate = resolve(text)
        same(candidate, found)
        assert (candidate.name, candidate.searched) == ('toy-teacher-seed0', 'toy/teacher')
    monkeypatch.chdir(run_folder)
    assert resolve('.').name == resolve('activation.json').name == 'toy-teacher-seed0'
    (run_folder / 'mine.json').write_text((run_folder / 'activation.json').read_text())
    assert resolve('mine.json').name == 'mine'
    same(resolve('gelu'), F.gelu)
    same(resolve('relu2'), lambda x: F.relu(x) ** 2)
    assert resolve('silu').searched == ''
    for name in NAMED:
        assert resolve(name).activation.expression == named(name).expression
    candidate = resolve('mul(sigmoid(x), x)')
    same(candidate, F.silu)
    assert resolve('mul( sigmoid(x),x )').name == candidate.name == 'mul(sigmoid(x),x)'
    expression = random_expression(torch.Generator().manual_seed(7))
    assert resolve('random_7').activation.expression == Activation(expression).expression
    Path('relu').mkdir()  # a folder of that name does not hide the function
    same(resolve('relu'), F.relu)


def test_random_cells_are_the_same_everywhere():
    """random_3 means one function, today and on another machine: the control group can be remade."""
    assert resolve('random_3').activation.expression == resolve('random_3').activation.expression
    assert len({resolve(f'random_{k}').activation.expression for k in range(30)}) > 28


@pytest.mark.parametrize('text, words', [
    ('gulu', ['gulu', 'did you mean gelu']), ('mul(sigmoid(x), y)', ['y']),
    ('mul(sigmod(x), x)', ['did you mean sigmoid']),
    ('runs/nowhere', ['runs/nowhere', 'No such file']), ('nowhere.json', ['nowhere.json', 'No such file']),
    ('broken.json', ['broken.json', 'not an activation.json']), ('empty', ['empty/activation.json', 'No such file']),
    ('lacking.json', ["lacks 'clip'"]), ('hostile.json', ['hostile.json', 'unexpected']), ('', ['the end'])])
def test_wrong_names(text, words, tmp_path, monkeypatch, capsys):
    """One line, exit code 2: what was wrong, where, and the nearest valid name; no ledger appears."""
    monkeypatch.chdir(tmp_path)
    Path('broken.json').write_text('{"expression": "relu(x')
    Path('lacking.json').write_text('{"expression": "relu(x)"}')
    Path('hostile.json').write_text('{"expression": "__import__(\'os\')", "clip": 1}')
    Path('empty').mkdir()
    with pytest.raises(SystemExit) as caught:
        evaluate.main([text, '--model', 'toy', '--steps', '2'])
    captured = capsys.readouterr()
    assert caught.value.code == 2 and captured.out == '' and len(captured.err.splitlines()) == 1
    assert all(word in captured.err for word in words), captured.err
    assert not Path('results.jsonl').exists()


@pytest.mark.parametrize('arguments, words', [
    ('--model toys', ['did you mean toy']), ('--data cifar10_61', ['did you mean cifar10_16']),
    ('--preset laptob', ['did you mean laptop']), ('--baselines relu,gulu', ['did you mean gelu']),
    ('--against gulu', ['did you mean gelu']), ('--seeds 0', ["--seeds '0'"]),
    ('--seeds 5:3', ["--seeds '5:3'"]), ('--random -1', ['--random -1']), ('--metric los', ['loss', 'accuracy']),
    ('--report nowhere.jsonl', ['nowhere.jsonl', 'no such file']), ('--card gulu', ['did you mean gelu']),
    ('--steps 0', ['--steps 0'])])
def test_wrong_input(arguments, words, tmp_path, monkeypatch, capsys):
    """As in search.py."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        evaluate.main(arguments.split())
    captured = capsys.readouterr()
    message = [line for line in captured.err.splitlines() if 'error: ' in line]
    assert caught.value.code == 2 and len(message) == 1 and captured.out == ''
    assert all(word in message[0] for word in words), message


def test_two_functions_of_one_name(run_folder, tmp_path, capsys):
    """Two run folders may be called alike; their functions are not mixed up."""
    other = tmp_path / 'other/toy-teacher-seed0'
    other.mkdir(parents=True)
    (other / 'activation.json').write_text('{"expression": "tanh(x)", "clip": 5.0}')
    with pytest.raises(SystemExit):
        run(tmp_path / 'ledger', run_folder, other)
    assert 'two different functions are called toy-teacher-seed0' in capsys.readouterr().err


@pytest.mark.parametrize('text, seeds', [('3', [0, 1, 2]), ('1', [0]), ('10:13', [10, 11, 12]), ('0:2', [0, 1])])
def test_seeds(text, seeds):
    """A number or a range, so that machines can share the work."""
    assert list(seeds_of(text)) == seeds


@pytest.mark.parametrize('text', ['0', '-1', '3:3', '5:2', '1:2:3', 'a', '', '1.5', '9' * 30])
def test_wrong_seeds(text):
    with pytest.raises(ValueError, match='--seeds'):
        seeds_of(text)


# ---------------------------------------------------------------------------------------------------------------------
# Runs.

def run(ledger, *words):
    """An evaluation of the toy network, 12 steps a run; the rows of its ledger."""
    usual = ('--model', 'toy', '--steps', 12, '--batch-size', 32, '--device', 'cpu', '--baselines', 'none', '--seeds', 2)
    evaluate.main([str(word) for word in (*usual, '--out', ledger, *words)])
    return rows_of(ledger)


def rows_of(ledger):
    return [json.loads(line) for line in Path(ledger).read_text().splitlines()]


def without_times(rows):
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def test_pairing(tmp_path):
    """One function under three names: differences are exactly 0, so seeds, weights and batches are the same."""
    rows = run(tmp_path / 'ledger', 'relu', 'relu(identity(x))', 'left(relu(x), tanh(x))', 'silu')
    for seed in 0, 1:
        mine = {row['name']: [row[key] for key in ('test_loss', 'test_accuracy', 'curve')] for row in rows
                if row['seed'] == seed}
        assert mine['relu'] == mine['relu(identity(x))'] == mine['left(relu(x),tanh(x))'] != mine['silu']
    printed = report(rows, 'relu', 'loss')
    line = next(line for line in printed.splitlines() if 'relu(identity(x))' in line)
    assert '| +0.0000 ' in line and '| +0.0000 to +0.0000 ' in line and '| 0/2 ' in line and '| the same ' in line


def test_pairing_of_a_language_model(tmp_path, monkeypatch):
    """The same with embeddings, attention and dropout, which draws random numbers as it goes."""
    text = data.load('tinystories_sample')
    text.test = text.test[:1000]
    monkeypatch.setattr(data, 'load', lambda *words: text)
    rows = run(tmp_path / 'ledger', 'gelu(identity(x))', '--model', 'minigpt', '--steps', 3, '--context', 16,
               '--batch-size', 2, '--dropout', 0.2, '--seeds', 1)
    one, two = rows
    assert (one['name'], two['name']) == ('gelu', 'gelu(identity(x))')
    assert one['test_loss'] == two['test_loss'] and one['curve'] == two['curve']
    assert one['settings']['data'] == 'tinystories_sample'


def test_one_run_against_a_loop_written_out(tmp_path):
    """Twelve steps of the toy network trained here, plainly: the ledger holds this loss, after the last step."""
    plain = ('--lr', 0.01, '--lr-end', 1, '--grad-clip', 0, '--weight-decay', 0)
    row, = run(tmp_path / 'ledger', '--seeds', '4:5', *plain)
    dataset = data.load('cifar10_16')
    torch.manual_seed(4)
    model = models.build('toy', torch.nn.ReLU, inputs=768, outputs=10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.99), weight_decay=0)
    batches = data.Batches(dataset, dataset.train, 32, 4, augment=True)
    for _ in range(12):
        x, y = next(batches)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    mean, std = data.normal(dataset, 'cpu')
    output = model((dataset.test[0] - mean) / std)
    assert row['test_loss'] == pytest.approx(F.cross_entropy(output, dataset.test[1]).item(), rel=1e-4)
    accuracy = (output.argmax(1) == dataset.test[1]).float().mean().item()
    assert row['test_accuracy'] == pytest.approx(accuracy, abs=0.0021)
    assert row['train_loss'] == pytest.approx(loss.item(), rel=1e-4)


def test_the_test_set_is_touched_once_a_run(tmp_path, monkeypatch):
    """After the last step, never to choose one."""
    calls, real = [], data.test_batches
    monkeypatch.setattr(data, 'test_batches', lambda *words: calls.append(words) or real(*words))
    rows = run(tmp_path / 'ledger', 'silu')
    assert len(rows) == 4 == len(calls)


def test_the_test_uses_the_network_as_it_will_be_used():
    """Without dropout and with the running statistics: the result does not depend on chance or on the batch size."""
    images, text = data.load('cifar10_16'), data.load('tinystories_sample')
    images.test, text.test = tuple(part[:40] for part in images.test), text.test[:700]
    for name, dataset in ('resnet20', images), ('minigpt', text):
        results = []
        for size in 40, 7:
            config = training.configure(evaluate.Config, evaluate.PRESETS, dict(
                model=name, device='cpu', batch_size=size, context=16, dropout=0.5))
            torch.manual_seed(0)
            results.append(evaluate.test(models_own.network(config, torch.nn.ReLU, dataset).train(), dataset, config))
        assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_what_a_row_holds(tmp_path, run_folder):
    """All that is needed to read it years later."""
    row = run(tmp_path / 'ledger', run_folder)[1]
    assert {'name', 'expression', 'clip', 'searched', 'seed', 'settings', 'test_loss', 'test_accuracy', 'train_loss',
            'diverged', 'learned', 'curve', 'seconds', 'ms_step', 'mb_kept', 'python', 'torch', 'device',
            'threads'} <= set(row)
    assert {'model', 'data', 'preset', 'steps', 'lr', 'batch_size'} <= set(row['settings'])
    assert row['searched'] == 'toy/teacher' and len(row['curve']) == 12 and row['clip'] == 5.0 and row['mb_kept'] > 0


def test_learned_scalars_are_trained_on_or_frozen(tmp_path, run_folder):
    """--freeze keeps them at what the search found; the ledger tells the two apart."""
    trained, = run(tmp_path / 'ledger', run_folder, '--against', run_folder, '--seeds', 1)
    rows = run(tmp_path / 'ledger', run_folder, '--against', run_folder, '--seeds', 1, '--freeze')
    assert trained['learned'] != [0.5] and rows[1]['learned'] == [0.5] and len(rows) == 2
    assert (trained['settings']['freeze'], rows[1]['settings']['freeze']) == (False, True)


def test_table_agrees_with_op_by_op(tmp_path):
    """The same training through a table: losses agree to the table's precision."""
    plain = run(tmp_path / 'a', 'mul(sigmoid(gelu(x)), elu(x))', '--seeds', 1)
    by_table = run(tmp_path / 'b', 'mul(sigmoid(gelu(x)), elu(x))', '--seeds', 1, '--table')
    for a, b in zip(plain, by_table):
        assert a['name'] == b['name'] and a['test_loss'] == pytest.approx(b['test_loss'], abs=2e-3)
    assert plain[1]['test_loss'] != by_table[1]['test_loss']  # it did take the other road


def test_diverged_runs_are_counted(tmp_path, capsys):
    """A learning rate that no network survives: the run is in the ledger, in the table, and in the verdict."""
    rows = run(tmp_path / 'ledger', 'square(x)', '--optimizer', 'sgd', '--lr', 1e6, '--grad-clip', 0)
    assert len(rows) == 4 and all(row['diverged'] and row['train_loss'] is None for row in rows)
    assert [row['test_loss'] for row in rows if row['name'] == 'relu'] == [None, None]  # not finite
    clipped = [row for row in rows if row['name'] == 'square(x)']
    assert all(row['test_loss'] > 1000 for row in clipped)                              # finite, and no result
    assert capsys.readouterr().out.count('diverged  ') >= 4
    finite = [{**row, 'diverged': False, 'test_loss': 1.0 + row['seed'], 'test_accuracy': 0.5, 'train_loss': 1.0}
              for row in rows if row['name'] == 'relu']
    printed = report(finite + clipped, 'relu', 'loss')
    line = next(line for line in printed.splitlines() if line.startswith('| square'))
    line = [cell.strip() for cell in line.split('|')]
    assert line[2:9] == ['2', '-', '-', '-', '0/0', 'worse: 2 diverged', '-'] and line[-2] == '2'


def test_transfer_is_labelled(tmp_path, run_folder, capsys):
    """A function that was found on another network or other data says so in the table; baselines do not."""
    run(tmp_path / 'ledger', run_folder, '--seeds', 1)
    printed = capsys.readouterr().out
    assert '| toy-teacher-seed0 (found on toy/teacher) ' in printed and printed.count('found on') == 1
    here = {'expression': 'tanh(x)', 'clip': 5.0, 'model': 'toy', 'data': 'cifar10_16'}
    (run_folder / 'activation.json').write_text(json.dumps(here))
    run(tmp_path / 'other', run_folder, '--seeds', 1)
    assert 'found on' not in capsys.readouterr().out


def test_metric_and_reference(tmp_path, capsys):
    """Accuracy for images unless --metric says otherwise; the best comes first; any activation may be the reference."""
    ledger = tmp_path / 'ledger'
    rows = run(ledger, 'silu', 'tanh')
    assert 'test accuracy | minus relu' in ' '.join(capsys.readouterr().out.split())
    rows = run(ledger, 'silu', 'tanh', '--metric', 'loss', '--against', 'tanh')
    printed = capsys.readouterr().out
    assert 'test loss | minus tanh' in ' '.join(printed.split()) and '| the reference ' in printed
    means = {name: np.mean([row['test_loss'] for row in rows if row['name'] == name]) for name in ('silu', 'tanh')}
    table = [line.split('|')[1].strip() for line in printed.splitlines() if line.startswith('| ')]
    assert table[-2:] == sorted(means, key=means.get)
    difference = np.mean([a['test_loss'] - b['test_loss'] for seed in (0, 1) for a in rows for b in rows
                          if (a['name'], b['name']) == ('silu', 'tanh') and a['seed'] == b['seed'] == seed])
    assert f'{difference:+.4f}' in next(line for line in printed.splitlines() if line.startswith('| silu'))


def test_baselines_and_random_cells(tmp_path, monkeypatch, capsys):
    """Added under the same settings: the usual ones by default, relu2 too for text, and --random N controls."""
    monkeypatch.setattr(evaluate, 'retrain', lambda candidate, config, dataset, seed: {
        'name': candidate.name, 'expression': candidate.activation.expression, 'clip': candidate.activation.clip,
        'searched': '', 'seed': seed, 'settings': evaluate.settings(config), 'test_loss': 1.0, 'test_accuracy': 0.5,
        'train_loss': 1.0, 'diverged': False, 'ms_step': 1.0, 'mb_kept': 1.0, 'seconds': 1.0, 'curve': []})
    for model, names in ('resnet20', {'relu', 'leaky_relu', 'elu', 'silu', 'gelu'}), \
                        ('minigpt', {'relu', 'leaky_relu', 'elu', 'silu', 'gelu', 'relu2'}):
        ledger = tmp_path / model
        evaluate.main(['--model', model, '--seeds', '1', '--random', '2', '--out', str(ledger), '--device', 'cpu'])
        rows = rows_of(ledger)
        assert {row['name'] for row in rows} == names | {'random_0', 'random_1'}
        assert len({json.dumps(row['settings']) for row in rows}) == 1
    assert {row['name'] for row in run(tmp_path / 'toy', '--baselines', 'tanh,mish')} == {'relu', 'tanh', 'mish'}


# ---------------------------------------------------------------------------------------------------------------------
# The card and the figures.

def test_card(capsys):
    """Of |x| and of a constant; moments under N(0, 1) are sqrt(2 / pi) and 1. No model, no training, no ledger."""
    evaluate.main(['--card', 'abs(x)'])
    card = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert card['formula'] == '|x|' and card['range'].startswith('0 to 5') and card['slope'] == '-1 to 1'
    assert card['monotone'] == 'no' and 'mean 0.7979, second moment 1' in evaluate.card(resolve('abs(x)'))
    for name, word in (('relu', 'rising'), ('neg(x)', 'falling'), ('const(2)', 'constant'), ('mul(x, x)', 'no')):
        assert f'monotone         {word}' in evaluate.card(resolve(name))
    assert 'relu' in card and 'ms' in card['relu'] and card['relu'].endswith('1.0 x relu')


def test_bytes_kept():
    """ReLU keeps its output, 4 bytes an element; a table keeps a 2-byte index; weights do not count."""
    x = torch.randn(1000, requires_grad=True)
    assert evaluate.bytes_kept(lambda: F.relu(x))[0] == 4000
    weight = torch.randn(50, 10, requires_grad=True)
    x = torch.randn(20, 50)
    assert evaluate.bytes_kept(lambda: x @ weight, [weight])[0] == 4000


def test_figures(tmp_path, capsys):
    """PNG and SVG of the functions, the test loss by seed and the learning curves."""
    pytest.importorskip('matplotlib')
    run(tmp_path / 'ledger', 'silu', '--figures', tmp_path / 'figures')
    names = {path.name for path in (tmp_path / 'figures').iterdir()}
    assert {f'{name}.{kind}' for name in ('functions', 'seeds', 'curves') for kind in ('png', 'svg')} <= names
    assert (tmp_path / 'figures/seeds.png').read_bytes()[:4] == b'\x89PNG'
    assert '<svg' in (tmp_path / 'figures/seeds.svg').read_text()


def test_figures_without_matplotlib(tmp_path, capsys, monkeypatch):
    """One line that says how to get it; the table is there all the same."""
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    run(tmp_path / 'ledger', '--seeds', 1, '--figures', tmp_path / 'figures')
    printed = capsys.readouterr().out
    assert 'pip install matplotlib' in printed and '| the reference ' in printed and not (tmp_path / 'figures').exists()


def test_table_while_it_runs(tmp_path, capsys):
    """After each seed the table so far is shown, and one at the end; what comes from the ledger only adds the last."""
    run(tmp_path / 'ledger', 'silu', '--seeds', 3)
    assert capsys.readouterr().out.count('| activation ') == 3
    run(tmp_path / 'ledger', 'silu', '--seeds', 3)
    assert capsys.readouterr().out.count('| activation ') == 1


def test_a_candidate_is_not_changed_by_training(tmp_path):
    """Every seed starts from the function as it was found, not from where the last run left its scalars."""
    config = training.configure(evaluate.Config, evaluate.PRESETS, dict(model='toy', steps=5, device='cpu'))
    candidate = Candidate('mine', Activation('scale(relu(x), 0.5)'))
    rows = [evaluate.retrain(candidate, config, data.load('cifar10_16'), seed=0) for _ in range(2)]
    assert candidate.activation.expression == 'scale(relu(x), 0.5)'
    assert without_times(rows[:1]) == without_times(rows[1:]) and rows[0]['learned'] != [0.5]
