/** The whole way from a URL to a tool's answer: the real server, the stand-in tenant, two kinds of client. */
import assert from "node:assert/strict";
import { once } from "node:events";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { after, describe, test, type TestContext } from "node:test";
import { Connector, publishClientMetadata } from "./support/chatgpt.ts";
import type { ConnectorOptions } from "./support/chatgpt.ts";
import { connect, Provider } from "./support/sdk-client.ts";
import { startServer } from "./support/server.ts";
import {
  ALICE,
  BOB,
  CLIENT_KINDS,
  configuredTenant,
  FIXED_CALLBACK_ID,
  FIXED_CLIENT,
  isStrict,
  OIDC_SCOPES,
  settingsFor,
  signIn,
  startTenant,
} from "./support/tenant.ts";
import type { ClientKind, SettingName, TenantKind, User } from "./support/tenant.ts";

const KINDS: TenantKind[] = ["permissive", "strict"];

/** The server and a tenant that is configured for it as the README says. */
async function start(t: TestContext, kind: TenantKind, env: Record<string, string> = {}, tenantHost = "localhost") {
  const tenant = await startTenant({ kind });
  t.after(() => tenant.close());
  const AUTH0_DOMAIN = tenant.origin.replace("localhost", tenantHost);
  const server = await startServer({ AUTH0_DOMAIN, ...env });
  t.after(() => server.close());
  Object.assign(tenant.settings, configuredTenant(kind, server.url));
  return { tenant, url: server.url };
}

async function link(
  t: TestContext,
  mcpServerUrl: string,
  user: User,
  options: Partial<ConnectorOptions> = {},
): Promise<Connector> {
  const connector = new Connector({ mcpServerUrl, browser: (url) => signIn(url, user), ...options });
  t.after(() => connector.close());
  await connector.link();
  return connector;
}

async function titles(connector: Connector): Promise<string[]> {
  const { structuredContent } = await connector.callTool("list_tasks");
  return (structuredContent as { tasks: { title: string }[] }).tasks.map(({ title }) => title);
}

/** What stops the user when one setting of the README's table "Which way is yours" is left out. */
const SYMPTOMS: Record<SettingName, (client: ClientKind) => RegExp> = {
  "api": () => /Service not found: http:\/\/localhost/,
  "offline-access": (client) => isStrict(client) ? /OAUTH_SCOPES_MISMATCH.*offline_access/ : /No refresh token/,
  "default-permissions": () => /Client "tpc_\w+" is not authorized to access resource server/,
  "default-audience": () => /401 .*JWE of 5 parts/,
  "registration": () => /Dynamic client registration is disabled/,
  "cimd": () => /Dynamic client registration is disabled/, // which ChatGPT then falls back to
  "connection": () => /no connections enabled for the client/,
  "action": () => /OAUTH_SCOPES_MISMATCH.*given_name/,
  "application": () => /Unknown client: fixed/,
  "callback": () => /Callback URL mismatch: https:\/\/chatgpt\.com\/connector\/oauth\/fixed/,
  "application-connection": () => /no connections enabled for the client/,
  "refresh-grant": () => /No refresh token/,
  "rotation": () => /Unknown or invalid refresh token/,
};

const tenant = await startTenant();
const server = await startServer({ AUTH0_DOMAIN: tenant.origin });
const clientDocuments = await publishClientMetadata();
after(async () => {
  await server.close();
  await clientDocuments.close();
  await tenant.close();
});

describe("Which way is yours", () => {
  function configure({ tenant: kind, way }: ClientKind, leftOut?: SettingName): void {
    Object.assign(tenant.settings, configuredTenant(kind, server.url, way, leftOut));
  }

  /** Links as this kind of client, with ChatGPT's form filled in as the README says, and stays signed in. */
  async function connectAs(t: TestContext, client: ClientKind, options: Partial<ConnectorOptions> = {}) {
    const connector = await link(t, server.url, ALICE, {
      oidcEnabled: !isStrict(client),
      callbackId: FIXED_CALLBACK_ID,
      ...(client.way === "cimd" && { clientDocuments }),
      ...(client.way === "fixed" && { fixedClient: FIXED_CLIENT }),
      ...options,
    });
    // ChatGPT may refresh twice at once, for which only an application made by hand can be prepared.
    await Promise.all([connector.refresh(), client.way === "fixed" && connector.refresh()]);
    return connector;
  }

  for (const client of CLIENT_KINDS) {
    const name = `${client.way} on a ${client.tenant} tenant`;

    for (const includesIssuer of [false, true]) {
      test(`${name} is linked, with iss ${includesIssuer ? "included" : "left out"}`, async (t) => {
        configure(client);
        tenant.settings.includeIssuerInAuthorizationResponses = includesIssuer;
        const callbackId = includesIssuer ? undefined : FIXED_CALLBACK_ID;
        if (client.way === "cimd") await tenant.importFromUrl(clientDocuments.url(callbackId));
        let redirect: string | null = null;
        const browser = (url: URL) => {
          redirect = url.searchParams.get("redirect_uri");
          return signIn(url, ALICE);
        };
        const { profile } = await connectAs(t, client, { browser });
        assert.equal(profile.id, ALICE.sub);
        assert.equal(
          redirect,
          includesIssuer
            ? "https://chatgpt.com/connector_platform_oauth_redirect"
            : "https://chatgpt.com/connector/oauth/fixed",
        );
      });
    }

    for (const leftOut of settingsFor(client)) {
      test(`${name} is stopped without ${leftOut}`, async (t) => {
        configure(client, leftOut);
        if (client.way === "cimd") await tenant.importFromUrl(clientDocuments.url(FIXED_CALLBACK_ID));
        await assert.rejects(connectAs(t, client), { message: SYMPTOMS[leftOut](client) });
      });
    }

    if (isStrict(client)) {
      test(`${name} is stopped with OIDC enabled left ticked`, async (t) => {
        configure(client);
        if (client.way === "cimd") await tenant.importFromUrl(clientDocuments.url(FIXED_CALLBACK_ID));
        await assert.rejects(connectAs(t, client, { oidcEnabled: true }), {
          code: "OAUTH_OWNER_PROFILE_ID_MISSING",
        });
      });
    }

    if (client.way === "cimd") {
      test(`${name} is stopped by an error that names the document to import`, async (t) => {
        configure(client);
        const unknown = {
          message: `Oops!, something went wrong invalid_request: Unknown client: ${
            clientDocuments.url(FIXED_CALLBACK_ID)
          }`,
        };
        await assert.rejects(connectAs(t, client), unknown);
      });
    }

    if (client.way === "fixed") {
      test(`${name} needs no Action once OIDC enabled is unticked`, async (t) => {
        configure(client, "action");
        assert.equal((await connectAs(t, client, { oidcEnabled: false })).profile.id, ALICE.sub);
      });
    }
  }
});

for (const kind of KINDS) {
  // On a strict tenant there is no ID token to be had: README, Step 7.
  const oidcEnabled = kind === "permissive";

  test(`ChatGPT links the server by its URL alone on a ${kind} tenant`, async (t) => {
    const { url } = await start(t, kind);
    const hops: number[] = [];
    const connector = await link(t, url, ALICE, { oidcEnabled, observe: (hop) => hops.push(hop.number) });
    assert.deepEqual(hops, [1, 2, 3, 4, 5, 6, 7, 8]);
    assert.equal(connector.profile.id, ALICE.sub);
    assert.deepEqual(connector.tools.map(({ name }) => name).toSorted(), [
      "create_task",
      "delete_task",
      "get_profile",
      "list_tasks",
      "update_task",
    ]);
  });

  test(`two users of a ${kind} tenant see their own tasks only`, async (t) => {
    const { url } = await start(t, kind);
    const alice = await link(t, url, ALICE, { oidcEnabled });
    const bob = await link(t, url, BOB, { oidcEnabled });
    await alice.callTool("create_task", { title: "Alice's" });
    await bob.callTool("create_task", { title: "Bob's" });
    assert.deepEqual(await titles(alice), ["Alice's"]);
    assert.deepEqual(await titles(bob), ["Bob's"]);
  });

  test(`a refreshed token of a ${kind} tenant reaches the same user's tasks, a stolen one ends the access`, async (t) => {
    const { url } = await start(t, kind);
    const connector = await link(t, url, ALICE, { oidcEnabled });
    await connector.callTool("create_task", { title: "Still there" });
    const first = { ...connector.tokens };
    await connector.refresh();
    assert.notEqual(connector.tokens.refresh_token, first.refresh_token);
    assert.equal(connector.tokens.scope, first.scope);
    assert.deepEqual(await titles(connector), ["Still there"]);
    const second = { ...connector.tokens };
    Object.assign(connector.tokens, first);
    await assert.rejects(connector.refresh(), { errorCode: "invalid_grant" });
    Object.assign(connector.tokens, second);
    await assert.rejects(connector.refresh(), { errorCode: "invalid_grant" });
  });

  test(`the SDK's own client signs in on a ${kind} tenant, and refreshes when a token has expired`, async (t) => {
    const { tenant, url } = await start(t, kind);
    const provider = new Provider();
    await (await connect(url, provider, ALICE)).close();
    const { refresh_token } = provider.tokens() ?? {};
    provider.saveTokens({
      ...provider.tokens(),
      access_token: await tenant.sign({ exp: 1 }),
      token_type: "Bearer",
    });
    const client = await connect(url, provider);
    t.after(() => client.close());
    const { structuredContent } = await client.callTool({ name: "get_profile" });
    assert.deepEqual(structuredContent, { id: ALICE.sub });
    assert.notEqual(provider.tokens()?.refresh_token, refresh_token);
  });

  test(`with ENFORCE_SCOPES the SDK's client asks a ${kind} tenant for what the tools need`, async (t) => {
    const { url } = await start(t, kind, { ENFORCE_SCOPES: "true" });
    const provider = new Provider();
    const client = await connect(url, provider, ALICE);
    t.after(() => client.close());
    assert.deepEqual(provider.tokens()?.scope?.split(" ").toSorted(), ["offline_access", "tasks:read", "tasks:write"]);
    const { isError } = await client.callTool({ name: "create_task", arguments: { title: "Allowed" } });
    assert.notEqual(isError, true);
  });
}

test("ChatGPT asks for all that the tenant advertises, and is granted exactly that", async (t) => {
  const { url } = await start(t, "permissive");
  const { tokens } = await link(t, url, ALICE);
  assert.deepEqual(tokens.scope?.split(" ").toSorted(), OIDC_SCOPES.toSorted());
});

test("with ENFORCE_SCOPES ChatGPT signs in again when a tool asks for it, and may then use it", async (t) => {
  const { url } = await start(t, "permissive", { ENFORCE_SCOPES: "true" });
  const connector = await link(t, url, ALICE);
  const refused = await connector.callTool("create_task", { title: "Not yet" });
  assert.equal(refused.isError, true);
  const [challenge] = refused._meta?.["mcp/www_authenticate"] as string[];
  assert.match(challenge ?? "", /^Bearer error="insufficient_scope".*scope="[^"]*tasks:write/);
  await connector.link();
  assert.notEqual((await connector.callTool("create_task", { title: "Now" })).isError, true);
  assert.deepEqual(await titles(connector), ["Now"]);
});

test("a permission that comes through RBAC opens the tool without being in scope", async (t) => {
  const { tenant, url } = await start(t, "permissive", { ENFORCE_SCOPES: "true" });
  tenant.settings.users = [{ ...ALICE, permissions: ["tasks:read"] }];
  for (const api of tenant.settings.apis) api.enableRbac = true;
  const connector = await link(t, url, ALICE);
  assert.deepEqual(await titles(connector), []);
  assert.equal((await connector.callTool("create_task", { title: "No" })).isError, true);
});

test("a user who declines leaves ChatGPT with access_denied", async (t) => {
  const { tenant, url } = await start(t, "permissive");
  const browser = (authorizeUrl: URL) => signIn(authorizeUrl, ALICE, "decline");
  for (const includesIssuer of [false, true]) {
    tenant.settings.includeIssuerInAuthorizationResponses = includesIssuer;
    await assert.rejects(link(t, url, ALICE, { browser }), /^Error: access_denied/);
  }
});

test("ChatGPT refuses an answer, or an error, without the iss that was promised, or with another", async (t) => {
  const { tenant, url } = await start(t, "permissive");
  tenant.settings.includeIssuerInAuthorizationResponses = true;
  const browser = async (authorizeUrl: URL) => {
    const callback = await signIn(authorizeUrl, ALICE);
    callback.searchParams.set("iss", tenant.origin); // the slash is missing
    return callback;
  };
  await assert.rejects(link(t, url, ALICE, { browser }), /iss http:\/\/localhost:\d+, expected \S+\/$/);
  tenant.withholdsIssuer = true;
  for (const decision of ["accept", "decline"] as const) {
    const options = { browser: (authorizeUrl: URL) => signIn(authorizeUrl, ALICE, decision) };
    await assert.rejects(link(t, url, ALICE, options), /has the iss \(none\), expected http/);
  }
});

test("ChatGPT keeps to one redirect a connection where the metadata names the issuer differently", async (t) => {
  const { tenant, url } = await start(t, "permissive", {}, "127.0.0.1");
  tenant.settings.includeIssuerInAuthorizationResponses = true;
  const browser = (authorizeUrl: URL) => Promise.reject(new Error(authorizeUrl.href));
  await assert.rejects(link(t, url, ALICE, { browser, callbackId: "one" }), /connector%2Foauth%2Fone&/);
});

test("ChatGPT asks for the scope of the challenge rather than the metadata's", async (t) => {
  const { tenant } = await start(t, "strict");
  const server = createServer(({ url }, response) => {
    response.setHeader(
      "www-authenticate",
      `Bearer resource_metadata="${resource}/metadata", scope="tasks:read offline_access"`,
    );
    response.writeHead(url === "/metadata" ? 200 : 401);
    response.end(JSON.stringify({
      resource,
      authorization_servers: [tenant.issuer],
      scopes_supported: ["tasks:write"],
    }));
  }).listen(0, "127.0.0.1");
  t.after(() => server.close());
  await once(server, "listening");
  const resource = `http://localhost:${(server.address() as AddressInfo).port}`;
  const browser = (authorizeUrl: URL) => Promise.reject(new Error(authorizeUrl.href));
  await assert.rejects(
    link(t, resource, ALICE, { browser, oidcEnabled: false }),
    /&scope=tasks%3Aread\+offline_access&/,
  );
});

test("a machine-to-machine token uses the tools as a user of its own", async (t) => {
  const { tenant, url } = await start(t, "permissive");
  const reply = await fetch(`${tenant.origin}/oauth/token`, {
    method: "POST",
    body: new URLSearchParams({
      grant_type: "client_credentials",
      client_id: "machine",
      client_secret: "machine-secret",
      audience: url,
    }),
  });
  const provider = new Provider();
  provider.saveTokens(await reply.json());
  const client = await connect(url, provider);
  t.after(() => client.close());
  const { structuredContent } = await client.callTool({ name: "get_profile" });
  assert.deepEqual(structuredContent, { id: "machine@clients" });
});
