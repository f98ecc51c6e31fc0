// Hydrogen, the light web client of Element's makers, started as its own entry page does. `?server=` fills in the server.
// Bundled by esbuild and driven by test_hydrogen.py.
import { FeatureSet, Platform, RootViewModel, createNavigation, createRouter } from "hydrogen-view-sdk";

const platform = new Platform({
    container: document.body,
    assetPaths: {
        downloadSandbox: "assets/download-sandbox.html",
        worker: "assets/main.js",
        serviceWorker: "sw.js",
        olm: { wasm: "olm/olm.wasm", legacyBundle: "olm/olm_legacy.js", wasmBundle: "olm/olm.js" },
    },
    config: { defaultHomeServer: new URLSearchParams(location.search).get("server") ?? "" },
    options: { development: false },
});
await platform.init();
const navigation = createNavigation();
platform.setNavigation(navigation);
const urlRouter = createRouter({ navigation, history: platform.history });
urlRouter.attach();
const features = await FeatureSet.load(platform.settingsStorage);
const everything = new RootViewModel({ platform, urlRouter, navigation, features });
await everything.load();
platform.createAndMountRootView(everything);
