"""What a model writes under each grammar, by the path of its threads, and the text that must come
out.
"""

from __future__ import annotations

import dataclasses

from apr import protocols


def kid(*ns):
    """The path of a child in the first block of each ancestor."""
    return tuple((0, n) for n in ns)


PARALLEL = "hm <Parallel><Goal><Outline>1: a</Outline><Outline>2: b</Outline></Goal>"
GUIDE = "<guideline><plan>1: a</plan><plan>2: b</plan></guideline>"
# preset: what the model writes, the text that must come out, (sampled, put in, critical, children,
# depth)
SCRIPTS = {
    "apr": (
        {
            (): "<Calling Sub Searches>\n<Start Sub Search 0 at level 1> N1\n"
            "<Start Sub Search 1 at level 1> N2\n<End Calling Sub Searches>ok",
            kid(1): "Goal Reached a Goal Reached b",
            kid(2): "none",
        },
        "<Sub Searches>\n<Goal Reached in Sub Search 0 at level 1>\na Goal Reached b\n"
        "<No Solution in Sub Search 1 at level 1>\n<End Sub Searches>\nok",
        2,
        1,
    ),
    "multiverse": (
        {
            (): PARALLEL + "so</Conclusion></Parallel> end",
            kid(1): " one</Path>",
            kid(2): " two" + PARALLEL + "t</Conclusion></Parallel></Path>",
            kid(2, 1): " deep</Path>",
            kid(2, 2): " deeper</Path>",
        },
        PARALLEL + "\n<Path>\n1: one</Path><Path>\n2: two" + PARALLEL + "\n<Path>\n1: deep</Path>"
        "<Path>\n2: deeper</Path>\n<Conclusion>\nt</Conclusion></Parallel></Path>\n<Conclusion>\n"
        "so</Conclusion></Parallel> end",
        4,
        2,
    ),
    "npr": (
        {(): GUIDE + "ok</takeaway>", kid(1): " x</step>", kid(2): " yyy</step>"},
        GUIDE + "\n<step>\n1: x</step><step>\n2: yyy</step>\n<takeaway>\nok</takeaway>",
        2,
        1,
    ),
    "parallel_r1": (
        {
            (): "a<Parallel>sum</Summary>b<Parallel>c</Summary>",
            kid(1): "one</Path>",
            kid(2): "two</Path>",
            ((1, 1),): "three</Path>",
            ((1, 2),): "4</Path>",
        },
        "a<Parallel><Path>one</Path><Path>two</Path></Parallel>\n<Summary>sum</Summary>b<Parallel>"
        "<Path>three</Path><Path>4</Path></Parallel>\n<Summary>c</Summary>",
        4,
        1,
    ),
    "threadweaver": (
        {
            (): "<Parallel><Outlines><Outline>1: a</Outline><Outline>3: b</Outline></Outlines>"
            "</Parallel>x",
            kid(1): " one</Thread>",
            kid(2): " two",
        },
        "<Parallel><Outlines><Outline>1: a</Outline><Outline>3: b</Outline></Outlines>\n"
        "<Thread>\n1: one</Thread><Thread>\n3: two</Thread>\n</Parallel>x",
        2,
        1,
    ),
    "pasta": (
        {
            (): 'go <promise topic="a" tokens="20"/> and '
            '<promise topic="b" tokens="9"/>more<sync/> '
            'x <promise topic="c" tokens="12"/>y',
            kid(1): "one</async>",
            ((1, 1),): "two</async>",
            ((2, 1),): "three</async>",
        },
        'go <promise topic="a" tokens="20"/><async>one</async> and '
        '<promise topic="b" tokens="9"/><async>two</async>more<sync/> x '
        '<promise topic="c" tokens="12"/><async>three</async>y',
        3,
        1,
    ),
    "parathinker": (
        {(): "final", kid(1): "abc</think1>", kid(2): "defghijklmnopqrst</think2>", kid(3): "uv"},
        # The third ends first, after "uv" and EOS; the others are taken with their three tokens.
        "<think1>abc</think1><think2>def</think2><think3>uv</think3><summary>final",
        3,
        1,
    ),
    "sprint": (
        {
            (): "<Plan><prompt>p1</prompt><prompt>p2</prompt></Plan>more<Plan><prompt>p3</prompt>"
            "</Plan>done",
            kid(1): "e1</execution>",
            kid(2): "e22</execution>",
            ((1, 1),): "e3</execution>",
        },
        "<Plan><prompt>p1</prompt><prompt>p2</prompt></Plan><Execution><execution>e1</execution>"
        "<execution>e22</execution></Execution>more<Plan><prompt>p3</prompt></Plan><Execution>"
        "<execution>e3</execution></Execution>done",
        3,
        1,
    ),
    "recursive": (
        {(): "<call>sub</call>fine", kid(1): "x<call>deep</call>y", kid(1, 1): "42"},
        "<call>sub</call><result>x<call>deep</call><result>42</result>y</result>fine",
        2,
        2,
    ),
}

PLANS = "<guideline><plan>1: a</plan><plan>2: b</plan></guideline>"
OTHERS = {
    "promises in promises": (
        protocols.pasta,
        {
            (): 'a<promise tokens="40"/>b<sync/>c',
            kid(1): 'x<promise tokens="5"/>y<sync/>z</async>',
            kid(1, 1): "in</async>",
        },
        'a<promise tokens="40"/><async>x<promise '
        'tokens="5"/><async>in</async>y<sync/>z</async>b<sync/>c',
    ),
    "promises that their makers do not collect": (
        protocols.pasta,
        {(): 'a<promise tokens="40"/>b', kid(1): 'x<promise tokens="5"/>y', kid(1, 1): "inner"},
        'a<promise tokens="40"/><async>x<promise tokens="5"/><async>inner</async>y</async>b',
    ),
    "more tokens than were promised": (
        protocols.pasta,
        {
            (): 'a<promise tokens="4"/><promise tokens="4"/>b<sync/>c',
            kid(1): "longer than reserved</async>",
            ((1, 1),): "q</async>",
        },
        'a<promise tokens="4"/><async>longer than reserved</async><promise tokens="4"/>'
        "<async>q</async>b<sync/>c",
    ),
    "promises as text": (
        dataclasses.replace(protocols.pasta, returns="text", reserve=0),
        {
            (): 'a<promise tokens="4"/>b<promise tokens="4"/>c<sync/>d',
            kid(1): "one</async>",
            ((1, 1),): "two",
        },
        'a<promise tokens="4"/>b<promise tokens="4"/>c<sync/><async>one</async><async>two</async>d',
    ),
    "the first of nested children": (
        dataclasses.replace(protocols.npr, until="first"),
        {
            (): PLANS + "end",
            kid(1): "ab" + PLANS + "cd</step>",
            kid(2): "x" * 70 + "</step>",
            kid(1, 1): "1" * 20,
            kid(1, 2): "2" * 30,
        },
        None,
    ),
    "a success among nested children": (
        dataclasses.replace(protocols.npr, until="success", success="yes"),
        {
            (): PLANS + "end",
            kid(1): "ab" + PLANS + "yes</step>",
            kid(2): "x" * 100 + "</step>",
            kid(1, 1): "yes</step>",
            kid(1, 2): "2" * 30,
        },
        PLANS
        + "\n<step>\n1:ab"
        + PLANS
        + "\n<step>\n1:yes</step>\n<takeaway>\nyes</step>\n<takeaway>\nend",
    ),
    "keys where they were written, one after the other": (
        dataclasses.replace(protocols.npr, returns="keep"),
        {(): PLANS + "end", kid(1): "one</step>", kid(2): "two two"},
        PLANS + "\n<step>\n1:one</step><step>\n2:two two</step>\n<takeaway>\nend",
    ),
    "the outline alone": (
        dataclasses.replace(protocols.npr, context="outline"),
        {
            (): PLANS + "end",
            kid(1): "one" + PLANS + "q</step>",
            kid(2): "two two",
            kid(1, 1): "m</step>",
            kid(1, 2): "n",
        },
        PLANS
        + "\n<step>\n1:one"
        + PLANS
        + "\n<step>\n1:m</step><step>\n2:n</step>\n<takeaway>\nq</step><step>\n2:two two</step>"
        "\n<takeaway>\nend",
    ),
}
