"""The grammars of published methods, as read in their code and papers; `replace(preset, width=4)`
makes yours.

Where a release and its training disagree (positions of line breaks), the release's engine is
followed.
"""

from __future__ import annotations

from apr.protocols.grammar import Grammar

_LABEL = r"([0-9]+(?:\.[0-9]+)*)\s*:"  # gaps and duplicates are taken as they are written

apr = Grammar(
    name="apr",
    source="Adaptive Parallel Reasoning, arXiv 2504.15466; github.com/Parallel-Reasoning/APR",
    open="<Calling Sub Searches>",
    outline=r"<Start Sub Search \d+ at level \d+>([^<\n]+)",
    launch="<End Calling Sub Searches>",
    context="fresh",
    child="{outline}\n",  # its driver adds the state of the node, which only Countdown's knows
    end=None,
    returns="message",
    success=r"Goal Reached.*Goal Reached",
    message=r"\A.*Goal Reached(.*?Goal Reached.*)\Z",
    rollback=True,
    before="<Sub Searches>\n",
    each="<Goal Reached in Sub Search {index} at level {depth}>\n{message}\n",
    otherwise="<No Solution in Sub Search {index} at level {depth}>\n",
    after="<End Sub Searches>\n",
)

multiverse = Grammar(
    name="multiverse",
    source="Multiverse, arXiv 2506.09991",
    open="<Parallel>",
    outline=r"<Outline>\s*" + _LABEL,
    launch="</Goal>",
    between="\n",
    child="<Path>\n{outline}:",
    end="</Path>",
    returns="max",
    after="\n<Conclusion>\n",
)

npr = Grammar(
    name="npr",
    source="Native Parallel Reasoner, arXiv 2512.07461",
    open="<guideline>",
    outline=r"<plan>\s*" + _LABEL,
    launch="</guideline>",
    between="\n",
    child="<step>\n{outline}:",
    end="</step>",
    returns="max",
    after="\n<takeaway>\n",
)

parallel_r1 = Grammar(
    name="parallel_r1",
    source="Parallel-R1, arXiv 2509.07980; github.com/zhengkid/Parallel-R1",
    open="<Parallel>",
    launch=None,
    width=2,
    child="<Path>",
    end="</Path>",
    returns="text",
    after="</Parallel>\n<Summary>",
    nested=False,
)

threadweaver = Grammar(
    name="threadweaver",
    source="ThreadWeaver, arXiv 2512.07843; github.com/facebookresearch/threadweaver",
    open="<Parallel>",
    outline=r"<Outline>\s*" + _LABEL,
    launch="</Outlines>",
    between="\n",
    child="<Thread>\n{outline}:",
    end="</Thread>",
    returns="text",
    after="\n",
    nested=False,
)

pasta = Grammar(
    name="pasta",
    source="PASTA, arXiv 2502.11517",
    open="<promise",
    launch="/>",
    outline=r"(.+)",
    child="<async>",
    end="</async>",
    blocking=False,
    # A child sees what stands before its promise and writes at the positions that were reserved for
    # it, so its keys are those of its text run again there: they are taken as they are.
    reserve=r"tokens=\"?(\d+)",
    returns="keep",
    sync="<sync/>",
)

parathinker = Grammar(
    name="parathinker",
    source="ParaThinker, arXiv 2509.04475; vectors of a path: apr.parathinker",
    open=None,
    launch=None,
    width=8,
    child="<think{n}>",
    end="</think{n}>",
    until="first",
    returns="max",
    after="<summary>",
    nested=False,
    forbidden=("<summary>",),
)

sprint = Grammar(
    name="sprint",
    source="SPRINT, arXiv 2506.05745: rounds of a plan and its executions; ours without numbers",
    open="<Plan>",
    outline=r"<prompt>((?:(?!<prompt>).)*?)</prompt>",
    launch="</Plan>",
    child="<execution>",
    end="</execution>",
    before="<Execution>",
    returns="text",
    after="</Execution>",
    nested=False,
)

recursive = Grammar(
    name="recursive",
    source="a string answered by a string, as in recursive language models, arXiv 2512.24601",
    open="<call>",
    launch="</call>",
    context="fresh",
    child="{outline}",
    end=None,
    returns="message",
    before="<result>",
    after="</result>",
)

PRESETS = {
    grammar.name: grammar
    for grammar in (
        apr,
        multiverse,
        npr,
        parallel_r1,
        threadweaver,
        pasta,
        parathinker,
        sprint,
        recursive,
    )
}
