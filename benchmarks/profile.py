"""The phases and kernels of one training step. The flags of main.py work, too.

    python -m benchmarks.profile --device cuda --model wrn-28-2 --batch-size 128 --mu 7 --amp --channels-last

The program itself marks forward, backward (with the losses), feedback and update (``engine.learner.phase``).
Time in a phase inside another phase counts for the inner phase alone. "method" is the remaining time of a
method's step, and "step" is the time outside of all other phases. On CUDA a kernel belongs to the phase that
launched it. A step that is replayed as a CUDA graph has no phases: all its kernels are in "step".
"""

import math

import torch
from torch.autograd import DeviceType

from benchmarks.common import Step, describe, new_parser, parse_step, run

PHASES = ("draw", "views", "forward", "backward", "feedback", "update", "method", "meters", "step")


def main(argv=None):
    args = parse_step(new_parser("benchmarks.profile", __doc__), argv)
    step, count = Step(args.options), args.repeats
    on_device = step.runtime.kind == "cuda"
    if step.runtime.graphed:
        with torch.profiler.profile():  # a graph made before the first session may hang when replayed in one
            pass
    step.seconds(4)  # compilers and cuDNN search in the first ones
    alone = step.seconds(count) / count
    events, watched = profiled(step, count)
    print(describe(args.options, args.threads))
    print(f"{1000 * alone:.2f} ms a step; {1000 * watched / count:.2f} ms under the profiler, as below")

    phases = Phases(events)
    print_phases("on the host", phases.host_seconds(), count)
    rows, intervals = kernels(events) if on_device else (operators(events), [])
    if on_device:
        print_phases("of kernels", phases.kernel_seconds(events, sum(row[1] for row in rows)), count)
    print_rows("kernel" if on_device else "operator, by its own time", rows, count)
    if on_device:
        busy, gaps = busy_and_gaps(intervals)
        idle = max(0.0, alone - busy / count)
        print(f"the device computes {1000 * busy / count:.2f} ms of a step and idles {1000 * idle:.2f} ms")
        print(f"under the profiler: {len(gaps) / count:.0f} gaps, {1000 * sum(gaps) / count:.2f} ms a step")


def profiled(step, count):
    """The profiler's events of ``count`` steps, and the seconds that all steps took."""
    activity = torch.profiler.ProfilerActivity
    activities = [activity.CPU] + [activity.CUDA] * (step.runtime.kind == "cuda")
    with torch.profiler.profile(activities=activities) as profiler:
        seconds = step.seconds(count)
    return profiler.events(), seconds


def print_phases(where, seconds, count):
    total = sum(seconds.values())
    print(f"\n{where:<12}{'ms':>10}{'share':>10}")
    for phase in PHASES:
        print(f"{phase:<12}{1000 * seconds[phase] / count:>10.3f}{100 * seconds[phase] / total:>8.1f} %")


def print_rows(what, rows, count):
    """The rows that take longest, [(name, seconds, calls)] of all steps, and their sum."""
    total = sum(seconds for _, seconds, _ in rows)
    print(f"\n{'ms':>10}{'share':>10}{'calls':>8}   {what}; one step")
    longest = sorted(rows, key=lambda row: row[1], reverse=True)[:20]
    for name, seconds, calls in [*longest, ("all of them", total, sum(row[2] for row in rows))]:
        share = f"{100 * seconds / total:.1f} %"
        print(f"{1000 * seconds / count:>10.3f}{share:>10}{calls / count:>8.0f}   {name[:70]}")


class Phases:
    """The phases in the events of a profile: ranges of time on the host, which may lie within each other."""

    def __init__(self, events):
        marked = [event for event in events if event.name in PHASES and event.device_type == DeviceType.CPU]
        ranges = [(event.name, event.time_range.start, event.time_range.end) for event in marked]
        self.ranges = sorted(ranges, key=lambda each: (each[1], -each[2]))  # the outer one first

    def at(self, time, count=None):
        """The innermost phase at a moment; of the first ``count`` ranges, if given."""
        around = (name for name, start, end in reversed(self.ranges[:count]) if start <= time < end)
        return next(around, "step")

    def host_seconds(self):
        """{phase: seconds, without the phases within it}."""
        seconds = dict.fromkeys(PHASES, 0.0)
        for number, (name, start, end) in enumerate(self.ranges):
            seconds[name] += (end - start) / 1e6
            if name != "step":
                seconds[self.at(start, number)] -= (end - start) / 1e6
        return seconds

    def kernel_seconds(self, events, total):
        """{phase: seconds of the kernels launched in it} out of ``total`` seconds."""
        seconds = dict.fromkeys(PHASES, 0.0)
        for event in events:
            # a mark spans kernels that the operators within it have launched
            if event.device_type == DeviceType.CPU and event.kernels and not event.is_user_annotation:
                phase = self.at(event.time_range.start)
                seconds[phase] += sum(kernel.duration for kernel in event.kernels) / 1e6
        seconds["step"] += total - sum(seconds.values())
        return seconds


def operators(events):
    """[(name, own seconds, calls)] of the operations on the host."""
    rows = [row for row in events.key_averages() if row.key not in PHASES]
    return [(row.key, row.self_cpu_time_total / 1e6, row.count) for row in rows]


def kernels(events):
    """[(name, seconds, calls)] of what ran on the device: kernels, copies and fills; and [(start, end)] of
    each call in seconds, by start."""
    times, intervals = {}, []
    for event in events:
        # annotations, such as those around an optimiser's step, are spans over kernels
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            start, end = event.time_range.start / 1e6, event.time_range.end / 1e6
            times.setdefault(event.name, []).append(end - start)
            intervals.append((start, end))
    return [(name, sum(each), len(each)) for name, each in times.items()], sorted(intervals)


def busy_and_gaps(intervals):
    """Seconds in which at least one of the (start, end), sorted by start, runs; the gaps between them."""
    busy, gaps, until = 0.0, [], -math.inf
    for start, end in intervals:
        if start > until > -math.inf:
            gaps.append(start - until)
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy, gaps


if __name__ == "__main__":
    run("benchmarks.profile", main)
