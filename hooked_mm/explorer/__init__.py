"""The explorer: one web page to ask a model, look at what happens inside it, and intervene.

| file | what |
|---|---|
| `conversation` | turns, pictures, settings of generation |
| `asked` | a question that was answered, as tabs look at it |
| `tab` | the protocol of tabs: controls, what is shown; the entry-point group by which packages contribute theirs |
| `panels` | what a tab can show, as data |
| `markup` | panels, the conversation and the patches as HTML; everything from a model or a person as text |
| `work` | one thread for the model: progress, cancelling |
| `visits` | what visitors have asked, each for themselves |
| `memory` | what is given back when a visit has ended |
| `edits` | pictures as they come from the page's editor: limits, masks |
| `bundle` | what is downloaded, with the Python that makes it |
| `uploads`, `downloads` | files from and to the browser |
| `notices` | the page's small texts |
| `page_layout`, `tab_area`, `web_page` | the page, in Gradio: what stands where, one tab, what each click calls |
| `desk` | what the page does for a visitor, without a page |
| `serving`, `gate` | the page as a server; what it refuses before anything else looks at it |
| `explore_command` | `hooked-mm explore` |
"""
