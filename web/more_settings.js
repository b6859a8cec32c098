// Settings that most people leave alone are folded away, with a button that shows them.

const WIDGET_PIXELS = 24;

/** Folds the node's advanced widgets. */
export function foldAdvanced(node) {
  const advanced = (node.widgets ?? []).filter((widget) => widget.options?.advanced);
  if (!advanced.length) return;
  if (globalThis.LiteGraph?.vueNodesMode) trim(node, advanced);
  else fold(node, advanced);
}

/** Nodes 2.0 folds them by itself, with a button of its own, but makes the node as high as if they were shown. */
function trim(node, advanced) {
  const resize = (size) => setTimeout(() => node.graph && node.setSize(size)); // after it has done so
  resize([node.size[0], node.size[1] - advanced.length * WIDGET_PIXELS]);
  const configured = node.onConfigure;
  node.onConfigure = function (saved, ...more) {
    configured?.call(this, saved, ...more);
    if (saved?.size) resize([...saved.size]);
  };
}

function fold(node, advanced) {
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
