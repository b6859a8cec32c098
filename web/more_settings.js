// Settings that most people leave alone are folded away, with a button that shows them.

/** Folds the node's advanced widgets. Nodes 2.0 does this by itself, with a button of its own. */
export function foldAdvanced(node) {
  const advanced = (node.widgets ?? []).filter((widget) => widget.options?.advanced);
  if (!advanced.length || globalThis.LiteGraph?.vueNodesMode) return;
  const toggle = () => {
    node.showAdvanced = !node.showAdvanced;
    show(node, advanced, button);
  };
  const button = node.addWidget("button", "more settings", null, toggle, { serialize: false });
  button.serialize = false; // saved values are positional: this one has none
  const configured = node.onConfigure;
  node.onConfigure = function (saved, ...more) {
    configured?.call(this, saved, ...more);
    show(node, advanced, button, saved?.size?.[1]);
  };
  show(node, advanced, button);
}

/** Shows or hides them as the node says; it becomes as high as it must, or as it was saved. */
function show(node, advanced, button, height = 0) {
  for (const widget of advanced) widget.hidden = !node.showAdvanced;
  button.label = node.showAdvanced ? "fewer settings" : "more settings";
  node.setSize([node.size[0], Math.max(node.computeSize()[1], height)]);
  node.setDirtyCanvas(true, true);
}
